"""SparseGPT: pruning by the layer's Hessian (Frantar & Alistarh 2023, arXiv 2301.00774).

With H = 2/n·Σ x xᵀ + damping and U the upper Cholesky factor of H⁻¹, a group's candidates are ranked by
w²/U_jj²; with weight update, the error e = (w − q)/U_jj of each column is passed on to the columns to
its right. With J the reversal of the columns and J H J = L Lᵀ, U = (J L J)⁻¹: one factorisation and a
triangular inverse instead of two factorisations and a full inverse, and diag U = 1/diag(J L J) alone
where weights are not updated.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from maskllm4v.calibration import Hessian
from maskllm4v.errors import DataError
from maskllm4v.patterns import NMPattern
from maskllm4v.pruners.result import Pruned

DAMPING = 0.01  # share of the mean diagonal, as in the original
BLOCK_SIZE = 128  # columns between two propagations to the rest of the row
MAX_RETRIES = 6


def prune_sparsegpt(
    weight: Tensor, statistic: Hessian, pattern: NMPattern, *, update_weights: bool, layer: str, seed: int
) -> Pruned:
    """Mask by w²/U_jj²; with ``update_weights``, also correct the weights to the right of each pruned one."""
    hessian = statistic.mean
    w = weight.to(hessian.dtype, copy=True)
    dead = hessian.diagonal() == 0  # inputs that never fire: their weights do not matter
    hessian.diagonal()[dead] = 1
    root = reversed_cholesky(hessian, layer)
    if not update_weights:
        return Pruned(pattern.topn_mask(w.square() * root.diagonal().square(), layer))
    w[:, dead] = 0
    mask = _prune_columns(w, upper_factor(root), pattern, layer)
    return Pruned(mask, (w * mask).to(weight.dtype))


def reversed_cholesky(hessian: Tensor, layer: str = "weight") -> Tensor:
    """R = J L J (upper triangular) with J H J = L Lᵀ of the damped Hessian ``[in, in]``; R⁻¹ = U.

    If rounding has cost positive definiteness, damping grows tenfold at a time, with a warning.

    Raises:
        DataError: the Hessian is not finite, or no damping helps.
    """
    if not torch.isfinite(hessian).all():
        raise DataError(f"layer {layer!r}: calibration gave inputs that are not finite")
    flipped = hessian.flip(0, 1)
    damping = DAMPING
    for _ in range(MAX_RETRIES):
        damped = flipped.clone()
        damped.diagonal().add_(damping * flipped.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            return factor.flip(0, 1)
        warnings.warn(f"layer {layer!r}: Hessian not positive definite at damping {damping:g}; raised", stacklevel=2)
        damping *= 10
    raise DataError(f"layer {layer!r}: Hessian is not positive definite even at damping {damping / 10:g}")


def upper_factor(root: Tensor) -> Tensor:
    """U = R⁻¹, the upper Cholesky factor of the inverse Hessian."""
    identity = torch.eye(root.shape[0], dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, identity, upper=True)


def _prune_columns(w: Tensor, u: Tensor, pattern: NMPattern, layer: str) -> Tensor:
    """Prune and correct ``w`` ``[out, in]`` in place, column by column; returns the mask."""
    mask = torch.empty_like(w, dtype=torch.bool)
    diagonal = u.diagonal()
    # Blocks end where a group ends, so that each group is chosen on weights that are up to date.
    block_size = max(BLOCK_SIZE // pattern.m, 1) * pattern.m
    for start in range(0, w.shape[1], block_size):
        stop = min(start + block_size, w.shape[1])
        errors = torch.zeros(w.shape[0], stop - start, dtype=w.dtype, device=w.device)
        for j in range(start, stop):
            if (j - start) % pattern.m == 0:
                group = slice(j, j + pattern.m)
                mask[:, group] = pattern.topn_mask(w[:, group].square() / diagonal[group].square(), layer)
            kept = w[:, j] * mask[:, j]
            error = (w[:, j] - kept) / diagonal[j]
            w[:, j:stop] -= torch.outer(error, u[j, j:stop])
            w[:, j] = kept
            errors[:, j - start] = error
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return mask
