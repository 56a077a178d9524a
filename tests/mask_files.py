"""A small model and small masks, for the tests of our files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.sparsity.patterns import NMPattern

BASE = "ab" * 32


def model(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False))


def random_mask(rows: int, columns: int, n: int, m: int) -> Tensor:
    kept = torch.rand(rows * columns // m, m).argsort(1) < n
    return kept.reshape(rows, columns)


def checkpoint(
    pattern: str = "2:4", *, weights: bool = False, prior: bool = False, order: int = 1, method: str = "wanda"
) -> MaskCheckpoint:
    """Two layers; ``order=-1`` lists them the other way round."""
    torch.manual_seed(1)
    n, m = (int(part) for part in pattern.split(":"))
    names = {"blocks.0.fc": (6, 16), "head": (3, 8)}
    masks = {name: random_mask(*shape, n, m) for name, shape in names.items()}
    priors = {name: random_mask(*shape, n, m) for name, shape in names.items()}
    values = {name: torch.randn(shape) for name, shape in names.items()}

    def part(wanted: bool, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(list(tensors.items())[::order]) if wanted else {}

    return MaskCheckpoint(
        NMPattern(pattern), part(True, masks), BASE, method, part(weights, values), part(prior, priors)
    )


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
