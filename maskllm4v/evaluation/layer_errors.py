"""Small per-layer measurements beside the metrics, so that reports need no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.sparsity.calibration import Calibration, counting_tokens, hooks_run, names_by_part
from maskllm4v.sparsity.layout import to_rows
from maskllm4v.sparsity.parameters import Matrix, find_matrix, matrices
from maskllm4v.sparsity.products import Product, ProductMode
from maskllm4v.utils.distributed import sum_

COLUMNS = (
    "layer",
    "prior_agreement",  # share of groups whose mask is the prior's; empty for one-shot rows
    "kept_energy",  # Σ(w ⊙ m)² / Σw² of the dense weights
    "output_error",  # ‖x Wᵀ − x Ŵᵀ‖ / ‖x Wᵀ‖ on the dense model's calibration inputs, of tokens that count
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
        ConfigError: a layer that no part names, or a part's ``tokens`` gives no mask for a layer's inputs.
        DataError: no parts.
    """
    found = {name: find_matrix(dense, name) for name in checkpoint.masks}
    place = {id(matrix.weight): i for i, matrix in enumerate(matrices(dense))}
    in_order = sorted(found, key=lambda name: place[id(found[name].weight)])
    errors = {name: torch.zeros(2, dtype=torch.float64) for name in checkpoint.masks}  # Σ error², Σ output²
    for part, names in zip(calibration, names_by_part(checkpoint.masks, calibration), strict=True):
        if not names:
            continue
        own = {name: found[name] for name in names}
        measured = {name: _Measure(matrix, checkpoint, errors[name]) for name, matrix in own.items()}
        for batch in part.batches:
            _show(dense, part, batch, own, measured)
    sum_(*errors.values())
    kept = {name: _kept_energy(found[name].rows, checkpoint.masks[name]) for name in in_order}
    return [
        (name, _agreement(checkpoint, name), f"{kept[name]:.6g}", f"{_relative(errors[name]):.6g}") for name in in_order
    ]


def _show(
    dense: nn.Module, part: Calibration, batch: Any, layers: Mapping[str, Matrix], measured: Mapping[str, _Measure]
) -> None:
    def add(product: Product, output: Tensor) -> None:
        counting = counting_tokens(part.tokens, product.name, product.inputs, batch)
        measured[product.name].add(product, output, counting)

    with hooks_run(), ProductMode(layers, after=add):
        part.forward(dense, batch)


class _Measure:
    """Sums the squared error of a matrix's outputs under its mask, and their own squares."""

    def __init__(self, matrix: Matrix, checkpoint: MaskCheckpoint, into: Tensor) -> None:
        weight, mask = matrix.weight, checkpoint.masks[matrix.name].to(matrix.weight.device)
        new = to_rows(checkpoint.weights.get(matrix.key, weight).to(weight), matrix.layout) * mask
        self._new = new.flatten(0, -2).chunk(matrix.blocks)
        self._rows = matrix.rows.flatten(0, -2).chunk(matrix.blocks)
        self._into, self._patches = into, matrix.layout == "patches"

    def add(self, product: Product, output: Tensor, counting: Tensor | None) -> None:
        inputs, rows = product.inputs, self._rows[product.block]
        difference = F.linear(inputs, self._new[product.block] - rows)
        if product.blocks == 1 and not self._patches:
            own = output - (product.bias if product.bias is not None else 0.0)
        else:  # the output is that of several blocks, or has its channels elsewhere
            own = F.linear(inputs, rows)
        if counting is not None:
            difference, own = difference[counting], own[counting]
        self._into.add_(torch.stack([difference.double().square().sum(), own.double().square().sum()]).cpu())


def _relative(sums: Tensor) -> float:
    error, output = sums.tolist()
    return float((error / output) ** 0.5) if output else 0.0


def _kept_energy(rows: Tensor, mask: Tensor) -> float:
    energy = rows.double().square()
    total = float(energy.sum())
    return float((energy * mask.to(energy.device)).sum()) / total if total else 1.0


def _agreement(checkpoint: MaskCheckpoint, name: str) -> str:
    priors: Mapping[str, Tensor] = checkpoint.prior
    if name not in priors:
        return ""
    assert checkpoint.pattern is not None  # there are masks
    same = (checkpoint.masks[name] == priors[name]).reshape(-1, checkpoint.pattern.m).all(1)
    return f"{float(same.double().mean()):.6g}"
