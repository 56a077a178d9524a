"""Wanda: weights times activation norms (Sun et al. 2023, arXiv 2306.11695, Eq. 1)."""

from torch import Tensor

from maskllm4v.oneshot.activations.statistics import InputNorm
from maskllm4v.oneshot.methods.result import Pruned
from maskllm4v.sparsity.patterns import NMPattern


def prune_wanda(
    weight: Tensor, statistic: InputNorm, pattern: NMPattern, *, update_weights: bool, layer: str, seed: int
) -> Pruned:
    """Score |W_ij|·‖x_j‖₂, compared within the groups of each output row."""
    return Pruned(pattern.topn_mask(weight.abs() * statistic.sum_of_squares.sqrt(), layer))
