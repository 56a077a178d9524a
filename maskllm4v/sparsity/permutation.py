"""Hidden channels that may change places without changing what a model computes.

The hidden units of an MLP may stand in any order, and so may the value channels within an attention head, as long as
what makes them (rows of matrices, biases), what reads them (columns of a matrix) and all that stands between (norms)
agree. Each expert of a stack is an MLP with an order of its own. N:M groups lie along the columns, so an order decides
what a group holds; it costs nothing at inference, for the tensors of a model are written down in that order.

Where such channels may be is told by names (:mod:`maskllm4v.sparsity.channel_blocks`). Whether they may move there is
asked of the block itself, which is tried out (:mod:`maskllm4v.sparsity.trial`): one that takes further arguments may
read the channels elsewhere, too. What reads them outside of their block (a hook, a parent that looks inside) is not
seen.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from maskllm4v.sparsity.channel_blocks import KINDS
from maskllm4v.sparsity.channels import Channels
from maskllm4v.sparsity.parameters import masked_parameters
from maskllm4v.sparsity.rollback import all_or_nothing
from maskllm4v.sparsity.trial import fault
from maskllm4v.utils.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


def find_channels(model: nn.Module, readers: Iterable[str]) -> dict[str, Channels]:
    """The channels that may be permuted, by the name of the matrix that reads them, in the model's order.

    Args:
        model: dense; not changed.
        readers: names of the matrices of interest. Those that read no hidden channels of a known kind of block are left
            out; so are, with a warning, those whose block shares weights or does not stand the test.

    Raises:
        ConfigError: the model has masks already, which would have to move along.
    """
    if masked := masked_parameters(model):
        raise ConfigError(f"layer {next(iter(masked))!r} has a mask already; channels are permuted before pruning")
    wanted, paths = set(readers), _paths(model)
    uses = _Uses(model, paths)
    found: dict[str, Channels] = {}
    for name, block in model.named_modules():
        for kind in KINDS:
            reader = f"{name}.{kind.reader}".lstrip(".")
            if reader not in wanted or (channels := kind.channels(block)) is None:
                continue
            wanted.remove(reader)  # other kinds that have it, too, see less of the block
            if any(uses.of(place.tensor) != paths[id(block)] for place in channels.places):
                wrong: str | None = "weights are shared with another layer"
            else:
                wrong = fault(block, kind, channels)
            if wrong is None:
                found[reader] = channels
            else:
                warnings.warn(f"layer {reader!r}: its input channels stay where they are: {wrong}", stacklevel=2)
    return found


def apply_permutations_(model: Model, permutations: Mapping[str, Tensor]) -> Model:
    """Permute the input channels of the named matrices, and what makes them, in place; returns the model.

    Args:
        model: dense.
        permutations: indices ``[in]`` by name, or ``[experts, in]`` of a stack of experts: channel ``permutation[i]``
            comes to stand in place i.

    Raises:
        ConfigError: a matrix whose channels cannot be permuted, or an index that is no permutation of them. After any
            error, or Ctrl-C, the model is as it was.
    """
    if not permutations:
        return model
    found = find_channels(model, permutations)
    for layer, order in permutations.items():
        if layer not in found:
            raise ConfigError(f"layer {layer!r}: no channels of the model that can be permuted")
        found[layer].check(order, layer)
    with all_or_nothing(model) as rollback:
        for layer, order in permutations.items():
            for place in found[layer].places:
                rollback.keep(place.tensor)
            found[layer].permute_(order)
        return model


def invert_permutations(permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What takes the permutations back, bit for bit, when it is applied after them."""
    return {layer: order.argsort() for layer, order in permutations.items()}


def _paths(model: nn.Module) -> Counter[int]:
    """Under how many names a model has each module, by its identity."""
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


class _Uses:
    """Under how many names a model has each tensor, or another in the same memory."""

    def __init__(self, model: nn.Module, paths: Counter[int]) -> None:
        self._spans = [
            (_span(tensor), paths[id(module)])
            for module in model.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]

    def of(self, tensor: Tensor) -> int:
        first, last = _span(tensor)
        return sum(count for (start, end), count in self._spans if start <= last and first <= end)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first and the last byte in memory; what has none is told by its identity."""
    if tensor.is_meta or not tensor.numel():
        return -id(tensor), -id(tensor)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size() - 1
