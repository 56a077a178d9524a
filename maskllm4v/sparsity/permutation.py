"""Hidden channels that may change places without changing what a model computes.

The hidden units of an MLP may stand in any order, and so may the value channels within an attention head, as long as
the layers that make them (rows of their weights), the layer that reads them (columns of its weight) and all that
stands between (norms) agree. N:M groups lie along the columns, so an order decides what a group holds; it costs nothing
at inference, for the tensors of a model are written down in that order.

Where such channels may be is told by names, those of timm's and diffusers' blocks. Whether they may move there is asked
of the block itself: a copy with random weights has to give the same outputs with its channels permuted as without,
and to need all its weights for them: one that takes further arguments may read the channels elsewhere, too. What reads
them outside of their block (a hook, a parent that looks inside) is not seen.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.parameters import masked_parameters
from maskllm4v.utils.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)
ROUNDING = 1e-9  # by which outputs of order 1 may differ in float64; those of a wrong order differ by order 1


@dataclass(frozen=True)
class Channels:
    """The channels that one linear layer reads.

    Attributes:
        count: how many there are.
        parts: they move within so many equal parts, the heads; 1: freely.
        places: all tensors that hold them: along which dimension, and from which index on.
    """

    count: int
    parts: int
    places: tuple[tuple[Tensor, int, int], ...]

    def check(self, order: Tensor, layer: str) -> None:
        """Raise :class:`ConfigError`, naming the layer that reads them, unless they may be put into that order."""
        places = torch.arange(self.count)
        if order.shape != places.shape or order.is_floating_point() or not order.sort().values.equal(places.to(order)):
            raise ConfigError(f"layer {layer!r}: not a permutation of its {self.count} input channels")
        size = self.count // self.parts
        if not (order // size).equal((places // size).to(order)):
            raise ConfigError(f"layer {layer!r}: a permutation that moves channels between its {self.parts} heads")

    @torch.no_grad()
    def permute_(self, order: Tensor) -> None:
        """Put channel ``order[i]`` in place i."""
        for tensor, dim, start in self.places:
            part = tensor.narrow(dim, start, self.count)
            part.copy_(part.index_select(dim, order.to(tensor.device, torch.long)))


@dataclass(frozen=True)
class _Kind:
    """A kind of block, by the names of what it holds.

    Attributes:
        makers: linear layers that make the channels.
        reader: the linear layer that reads them.
        heads: attribute that holds their number, where the makers' last outputs are the values; None for MLPs, where
            a maker's outputs may be several times the channels (gate and value), all in the same order.
        along: modules and parameters that have a value a channel, if the block has them.
    """

    makers: tuple[str, ...]
    reader: str
    heads: str | None = None
    along: tuple[str, ...] = ("norm",)


_WITH_VALUES = ("norm", "gate", "v_bias")
KINDS = (
    _Kind(("fc1",), "fc2"),  # timm: Mlp, GluMlp
    _Kind(("fc1_g", "fc1_x"), "fc2"),  # timm: SwiGLU
    _Kind(("net.0.proj",), "net.2"),  # diffusers: FeedForward
    _Kind(("qkv",), "proj", "num_heads", _WITH_VALUES),  # timm
    _Kind(("v_proj",), "proj", "num_heads", _WITH_VALUES),  # timm, where q, k and v are separate
    _Kind(("to_v",), "to_out.0", "heads"),  # diffusers
)


def find_channels(model: nn.Module, readers: Iterable[str]) -> dict[str, Channels]:
    """The channels that may be permuted, by the name of the layer that reads them, in the model's order.

    Args:
        model: dense; not changed.
        readers: names of the layers of interest. Those that read no hidden channels of a known kind of block are left
            out; so are, with a warning, those whose block shares weights or does not stand the test.

    Raises:
        ConfigError: the model has masks already, which would have to move along.
    """
    if masked := masked_parameters(model):
        raise ConfigError(f"layer {next(iter(masked))!r} has a mask already; channels are permuted before pruning")
    wanted, owners = set(readers), _owners(model)
    found: dict[str, Channels] = {}
    for name, block in model.named_modules():
        for kind in KINDS:
            reader = f"{name}.{kind.reader}".lstrip(".")
            if reader not in wanted or (channels := _channels(block, kind)) is None:
                continue
            if any(owners[id(tensor)] > 1 for tensor, _, _ in channels.places):
                fault: str | None = "weights are shared with another layer"
            else:
                fault = _fault(block, kind, channels)
            if fault is None:
                found[reader] = channels
            else:
                warnings.warn(f"layer {reader!r}: its input channels stay where they are: {fault}", stacklevel=2)
    return found


def apply_permutations_(model: Model, permutations: Mapping[str, Tensor]) -> Model:
    """Permute the input channels of the named layers, and what makes them, in place; returns the model.

    Args:
        model: dense.
        permutations: indices ``[in]`` by layer name: channel ``permutation[i]`` comes to stand in place i.

    Raises:
        ConfigError: a layer whose channels cannot be permuted, or an index that is no permutation of them; nothing
            is changed then.
    """
    if not permutations:
        return model
    found = find_channels(model, permutations)
    for layer, order in permutations.items():
        if layer not in found:
            raise ConfigError(f"layer {layer!r}: no channels of the model that can be permuted")
        found[layer].check(order, layer)
    for layer, order in permutations.items():
        found[layer].permute_(order)
    return model


def invert_permutations(permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What takes the permutations back, bit for bit, when it is applied after them."""
    return {layer: order.argsort() for layer, order in permutations.items()}


def _owners(model: nn.Module) -> Counter[int]:
    """In how many places of a model each tensor stands, by its identity; a block that is used twice counts once."""
    parents = Counter(id(child) for module in model.modules() for child in module.children())
    owners = Counter[int]()
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            owners[id(tensor)] += max(parents[id(module)], 1)
    return owners


def _channels(block: nn.Module, kind: _Kind) -> Channels | None:
    """The channels of a block, if it is of that kind."""
    makers, reader = [_inside(block, name) for name in kind.makers], _inside(block, kind.reader)
    if type(reader) is not nn.Linear or any(type(maker) is not nn.Linear for maker in makers):
        return None
    count, parts = reader.in_features, getattr(block, kind.heads, None) if kind.heads else 1
    if not isinstance(parts, int) or parts < 1 or count % parts or any(m.out_features % count for m in makers):
        return None
    places = [(reader.weight, 1, 0)]
    for maker in makers:
        starts = range(0, maker.out_features, count)
        for start in starts[-1:] if kind.heads else starts:
            places += [(tensor, 0, start) for tensor in maker.parameters()]
    for name in kind.along:
        for tensor in _tensors(_inside(block, name)):
            if tensor.ndim and tensor.shape[0] == count:
                places.append((tensor, 0, 0))
    return Channels(count, parts, tuple(places))


def _inside(block: nn.Module, name: str) -> Any:
    """What a block keeps under a dotted name; None if it has nothing there."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _tensors(of: Any) -> list[Tensor]:
    if isinstance(of, nn.Module):
        return [*of.parameters(), *of.buffers()]
    return [of] if isinstance(of, Tensor) else []


def _fault(block: nn.Module, kind: _Kind, channels: Channels) -> str | None:
    """Why the channels of a block may not be permuted, found by trying it on a copy; None if they may."""
    noise = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(block)
    twin.to("cpu", torch.float64)  # in place, like eval, whose overrides in timm return nothing
    twin.eval()
    twin.requires_grad_()
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for weight in weights.values():  # nothing may agree because it happens to be zero or one
            random = torch.randn(weight.shape, generator=noise, dtype=torch.float64)
            weight.copy_(random / prod(weight.shape[-1:]) ** 0.5)
        for buffer in twin.buffers():
            if buffer.is_floating_point():  # variances are positive
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=noise, dtype=torch.float64))
    positions = getattr(block, "relative_position_index", None)  # timm's attention with it takes that many tokens
    tokens = len(positions) if isinstance(positions, Tensor) else 4
    inputs = torch.randn(2, tokens, _inside(twin, kind.makers[0]).in_features, generator=noise, dtype=torch.float64)
    own, size = _channels(twin, kind), channels.count // channels.parts
    assert own is not None  # it is a copy
    try:
        with torch.enable_grad():
            before = twin(inputs.clone())
            needed = torch.autograd.grad(before.sum(), list(weights.values()), allow_unused=True)
        with torch.no_grad():
            own.permute_(torch.cat([torch.randperm(size, generator=noise) + i * size for i in range(own.parts)]))
            after = twin(inputs.clone())
        same = torch.allclose(before, after, rtol=ROUNDING, atol=ROUNDING)
    except Exception as error:  # whatever a block of somebody else's stumbles over
        said = str(error).partition("\n")[0]
        return f"its {type(block).__name__} cannot be tried out alone ({said or type(error).__name__})"
    if idle := [name for name, gradient in zip(weights, needed, strict=True) if gradient is None]:
        return f"its {type(block).__name__} does not use {idle[0]!r} when it is tried out alone"
    return None if same else f"the outputs of its {type(block).__name__} depend on their order"
