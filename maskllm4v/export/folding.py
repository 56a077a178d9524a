"""Whether a model computes under its masks what it computes with them folded into its weights.

It does not, where something reads a weight past its mask: outputs are the dense model's then, and nothing of what was
measured or learned under the masks holds for what is shipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from maskllm4v.oneshot.activations.hooks import evaluating
from maskllm4v.sparsity.calibration import Forward, default_forward
from maskllm4v.sparsity.parameters import masked_parameters
from maskllm4v.sparsity.surgery import fold_
from maskllm4v.sparsity.usage import each_mask_used
from maskllm4v.utils.errors import ConfigError, PatternError

BOUND = 16  # in units of the rounding error of the largest value; weights are the same, so most often bits are, too


@torch.no_grad()
def check_folded(model: nn.Module, batch: Any, *, forward: Forward = default_forward) -> None:
    """Compare a masked model with a folded copy of it on a batch, in evaluation mode.

    Args:
        model: with masks; left as it is.
        batch: what ``forward`` takes, on the model's device. Every mask has to be used on it.
        forward: ``forward(model, batch)``.

    Raises:
        PatternError: outputs differ; names the first layer whose outputs do.
        ConfigError: the model has no masks, or nothing read the weight under one; names the parameters.
    """
    if not masked_parameters(model):
        raise ConfigError("the model has no masks, so there is nothing to compare")
    with evaluating(model):
        folded = fold_(copy.deepcopy(model))
        with each_mask_used(model):
            outputs = forward(model, batch)
        apart = differences(outputs, forward(folded, batch))
        output, off = max(apart.items(), key=lambda one: one[1], default=("", 0.0))
        if off <= BOUND:
            return
        seen = list[tuple[str, Any]]()
        with _watched(model, lambda name, output: seen.append((name, tree_map_only(Tensor, Tensor.clone, output)))):
            forward(model, batch)
        ahead, found = iter(seen), list[str]()

        def compare(name: str, output: Any) -> None:
            of_masked = next(ahead, None)
            if not found and (of_masked is None or of_masked[0] != name or difference(of_masked[1], output) > BOUND):
                found.append(name)

        with _watched(folded, compare):
            forward(folded, batch)
    where = f"layer {found[0]!r}" if found and found[0] else "the model as a whole"
    raise PatternError(
        f"{where}: other outputs under masks than folded; outputs{output} of the model is off by {off:.3g} rounding "
        "errors of its largest value. Something reads a weight past its mask"
    )


def difference(outputs: Any, others: Any) -> float:
    """The largest of :func:`differences`."""
    return max(differences(outputs, others).values(), default=0.0)


def differences(outputs: Any, others: Any) -> dict[str, float]:
    """How far each tensor of two outputs is off, in units of the rounding error of its largest value.

    Keys say where it is: ``"['boxes']"``, ``"[0]"``, or ``""`` if there is nothing else.
    """
    found, wanted = _tensors(outputs), _tensors(others)
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
        return {"": float("inf")}
    return {name: _apart(one, wanted[name]) for name, one in found.items()}


def _apart(one: Tensor, other: Tensor) -> float:
    apart = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
    scale = torch.finfo(one.dtype).eps * one.abs().nan_to_num().amax().clamp_min(torch.finfo(one.dtype).tiny)
    return float(apart.nan_to_num(nan=torch.inf).amax() / scale)


def _tensors(outputs: Any) -> dict[str, Tensor]:
    """All tensors of numbers in what a model or layer gives, by where they are."""
    leaves = {keystr(path): leaf for path, leaf in tree_flatten_with_path(outputs)[0]}
    return {
        name: leaf
        for name, leaf in leaves.items()
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    }


@contextmanager
def _watched(model: nn.Module, see: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside, all modules' outputs are shown, by name and as they come: what lies within a module comes before it."""
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: see(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
