"""Magnitude pruning: keep the largest |w| of every group."""

from typing import Any

from torch import Tensor

from maskllm4v.oneshot.methods.result import Pruned
from maskllm4v.sparsity.patterns import NMPattern


def prune_magnitude(
    weight: Tensor, statistic: Any, pattern: NMPattern, *, update_weights: bool, layer: str, seed: int
) -> Pruned:
    """Score |w|."""
    return Pruned(pattern.topn_mask(weight.abs(), layer))
