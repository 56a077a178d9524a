"""Least squares: the best weights that a mask allows, row by row.

A row of the layer w, zero outside the set S that its mask keeps, shall give on the layer's inputs x′ what the dense
weights W give on x: the dense network's own inputs (asymmetric target), or x′ again (symmetric). With
H = 2/n·Σ x′x′ᵀ, G = 2/n·Σ x′xᵀ and a ridge λ towards W, the minimum is the solution of

    (H + λ)_SS w_S = (G W + λ W)_S,

a system of its own for each row. ADMM-based pruning (Boža 2024, arXiv 2401.02938) and ALPS (Meng et al. 2024,
arXiv 2406.07831) approach the symmetric one by iteration; here it is factorised, a few rows at a time.

All is computed in the statistic's precision, float32: the ridge keeps systems far from singular. Solutions are within
1e-5 of those in float64 for inputs about zero (tests/test_updates.py), within 1e-4 where a mean outweighs their spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskllm4v.oneshot.activations.statistics import CrossCovariance, Hessian, full_float32
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import DataError

CHUNK = 2**27  # bytes of systems that are factorised together; three times that is held
SMALLEST_PIVOT = 4  # in units of the rounding error of what is on the diagonal; below it, a pivot is taken for zero


def update_least_squares(
    weight: Tensor,
    mask: Tensor,
    statistic: Hessian | CrossCovariance,
    pattern: NMPattern,
    *,
    damping: float,
    layer: str,
) -> Tensor:
    """The best weights under a mask.

    Args:
        weight: ``[out, in]``, the dense one; not changed.
        mask: boolean ``[out, in]``.
        statistic: of the layer's inputs; :class:`CrossCovariance` makes the target asymmetric.
        pattern: the mask's, by which all rows keep as many weights.
        damping: λ as a share of H's mean diagonal, of inputs that ever fire.
        layer: name for messages.

    Returns:
        New weights ``[out, in]``, zero where pruned. Those of inputs that never fire stay as they are.

    Raises:
        DataError: the inputs are not finite, or a row's system is singular.
    """
    hessian, paired = (statistic.hessian, statistic) if isinstance(statistic, CrossCovariance) else (statistic, None)
    h = hessian.mean
    dead = h.diagonal() == 0
    ridge = damping * h.diagonal().mean() * (len(dead) / max(1, int((~dead).sum())))
    h.diagonal()[dead] = 1
    cross = h.clone() if paired is None else paired.mean.to(h)
    cross.diagonal()[dead] = 1
    h.diagonal().add_(ridge)
    w = weight.to(h.dtype)
    with full_float32(weight.device):
        target = w @ cross.t() + ridge * w
        if not (torch.isfinite(h).all() and torch.isfinite(target).all()):
            raise DataError(f"layer {layer!r}: calibration gave inputs that are not finite")
        return solve_rows(h, target, mask, layer=layer).to(weight.dtype)


def solve_rows(h: Tensor, target: Tensor, mask: Tensor, *, layer: str = "weight") -> Tensor:
    """Solve h_SS w_S = target_S for each row, S being what the row's mask keeps.

    Args:
        h: ``[in, in]``, symmetric.
        target: ``[out, in]``.
        mask: boolean ``[out, in]``, keeping as many weights of each row.
        layer: name for messages.

    Returns:
        ``[out, in]``, zero where the mask is.

    Raises:
        DataError: a row's system is singular.
    """
    rows = len(mask)
    columns = mask.nonzero()[:, 1].view(rows, -1)
    kept = columns.shape[1]
    found = torch.zeros_like(target)
    smallest = SMALLEST_PIVOT * torch.finfo(h.dtype).eps
    size = max(1, CHUNK // (kept * kept * h.element_size()))
    for start in range(0, rows, size):
        own = columns[start : start + size]
        systems = h[own[:, :, None], own[:, None, :]]
        factors, info = torch.linalg.cholesky_ex(systems)
        pivots = factors.diagonal(dim1=1, dim2=2).square()
        singular = (info != 0) | (pivots <= smallest * systems.diagonal(dim1=1, dim2=2)).any(1)
        if singular.any():
            row = start + int(singular.nonzero()[0])
            raise DataError(
                f"layer {layer!r}, row {row}: the least-squares system of its {kept} kept weights is singular; "
                "calibrate on more samples, or raise `damping`"
            )
        right = target[start : start + size].gather(1, own)
        found[start : start + size].scatter_(1, own, torch.cholesky_solve(right[..., None], factors)[..., 0])
    return found
