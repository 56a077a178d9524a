"""SparseGPT's update alone, for a mask that is given (Frantar & Alistarh 2023, arXiv 2301.00774)."""

from __future__ import annotations

from torch import Tensor

from maskllm4v.oneshot.activations.statistics import Hessian, full_float32
from maskllm4v.oneshot.methods.sparsegpt import (
    correct_columns,
    live_columns,
    live_hessian,
    reversed_cholesky,
    upper_factor,
)
from maskllm4v.sparsity.patterns import NMPattern


def update_sparsegpt(
    weight: Tensor, mask: Tensor, statistic: Hessian, pattern: NMPattern, *, damping: float, layer: str
) -> Tensor:
    """Pass the error of each pruned weight on to the weights to its right.

    On SparseGPT's own mask these are the weights that pruning by SparseGPT with update gives, to the bit.

    Args:
        weight: ``[out, in]``, the dense one; not changed.
        mask: boolean ``[out, in]``.
        statistic: of the layer's inputs.
        pattern: the mask's.
        damping: share of the Hessian's mean diagonal.
        layer: name for messages.

    Returns:
        New weights ``[out, in]``, zero where pruned and where inputs never fire.

    Raises:
        DataError: see :func:`~maskllm4v.oneshot.methods.sparsegpt.reversed_cholesky`.
    """
    hessian, dead = live_hessian(statistic)
    with full_float32(weight.device):
        columns = live_columns(weight, dead, hessian.dtype)
        correct_columns(columns, upper_factor(reversed_cholesky(hessian, layer, damping)), mask, pattern)
    return columns.t().to(weight.dtype)
