"""Small per-layer measurements beside the metrics, so that reports need no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.sparsity.calibration import Calibration, names_by_part
from maskllm4v.sparsity.parameters import get_linear
from maskllm4v.utils.distributed import sum_

COLUMNS = (
    "layer",
    "prior_agreement",  # share of groups whose mask is the prior's; empty for one-shot rows
    "kept_energy",  # Σ(w ⊙ m)² / Σw² of the dense weights
    "output_error",  # ‖x Wᵀ − x Ŵᵀ‖ / ‖x Wᵀ‖ on the dense model's calibration inputs
)


@torch.no_grad()
def layer_diagnostics(
    dense: nn.Module, checkpoint: MaskCheckpoint, calibration: Sequence[Calibration]
) -> list[tuple[str, str, str, str]]:
    """Rows of :data:`COLUMNS`, a layer each.

    Args:
        dense: the dense model, in evaluation mode.
        checkpoint: masks, and updated weights if any.
        calibration: the error of each layer's output is measured on the batches of its own part.

    Raises:
        ConfigError: a layer that no part names.
        DataError: no parts.
    """
    in_order = {name: checkpoint.masks[name] for name, _ in dense.named_modules() if name in checkpoint.masks}
    errors = {name: torch.zeros(2, dtype=torch.float64) for name in checkpoint.masks}  # Σ error², Σ output²
    for part, names in zip(calibration, names_by_part(checkpoint.masks, calibration), strict=True):
        if not names:
            continue
        handles = []
        for name in names:
            layer, mask = get_linear(dense, name), checkpoint.masks[name]
            weight = checkpoint.weights.get(f"{name}.weight", layer.weight).to(layer.weight) * mask.to(
                layer.weight.device
            )
            handles.append(layer.register_forward_hook(_measure(weight, layer, errors[name])))
        try:
            for batch in part.batches:
                part.forward(dense, batch)
        finally:
            for handle in handles:
                handle.remove()
    sum_(*errors.values())
    return [
        (name, _agreement(checkpoint, name), f"{_kept_energy(dense, name, mask):.6g}", f"{_relative(errors[name]):.6g}")
        for name, mask in in_order.items()
    ]


def _measure(weight: Tensor, layer: nn.Linear, into: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        difference = F.linear(args[0], weight - layer.weight)
        bias = layer.bias if layer.bias is not None else 0.0
        into.add_(torch.stack([difference.double().square().sum(), (output - bias).double().square().sum()]).cpu())

    return hook


def _relative(sums: Tensor) -> float:
    error, output = sums.tolist()
    return float((error / output) ** 0.5) if output else 0.0


def _kept_energy(dense: nn.Module, name: str, mask: Tensor) -> float:
    energy = get_linear(dense, name).weight.double().square()
    total = float(energy.sum())
    return float((energy * mask.to(energy.device)).sum()) / total if total else 1.0


def _agreement(checkpoint: MaskCheckpoint, name: str) -> str:
    priors: Mapping[str, Tensor] = checkpoint.prior
    if name not in priors:
        return ""
    assert checkpoint.pattern is not None  # there are masks
    same = (checkpoint.masks[name] == priors[name]).reshape(-1, checkpoint.pattern.m).all(1)
    return f"{float(same.double().mean()):.6g}"
