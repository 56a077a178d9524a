"""Magnitude pruning: keep the largest |w| of every group."""

from typing import Any

from torch import Tensor

from maskllm4v.patterns import NMPattern
from maskllm4v.pruners.result import Pruned


def prune_magnitude(
    weight: Tensor, statistic: Any, pattern: NMPattern, *, update_weights: bool, layer: str, seed: int
) -> Pruned:
    """Score |w|."""
    return Pruned(pattern.topn_mask(weight.abs(), layer))
