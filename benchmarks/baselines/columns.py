"""One-shot pruning of one layer as the methods' public implementations do it: a loop over columns or groups.

Written from the papers: SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, Algorithm 1) and Wanda (Sun et al.
2023, arXiv 2306.11695, Eq. 1). Every group's candidates are found by ``topk`` and marked by ``scatter_``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskllm4v.oneshot.prune import Pruned
from maskllm4v.sparsity.patterns import NMPattern

BLOCK_SIZE = 128
DAMPING = 0.01


class PlainHessian:
    """Σ x xᵀ over all input rows by one product a batch, ``[in, in]``, float32."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_of_products = torch.zeros(in_features, in_features, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        self.sum_of_products.addmm_(rows.t(), rows)
        self.rows += rows.shape[0]

    def combine(self) -> None:
        raise NotImplementedError("benchmarks run in one process")

    @property
    def mean(self) -> Tensor:
        """H = 2/n · Σ x xᵀ."""
        return self.sum_of_products * (2 / self.rows)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, ``[in, in]``: two factorisations, one inverse."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def sparsegpt_(weight: Tensor, hessian: Tensor, n: int, m: int, update: bool) -> Tensor:
    """SparseGPT's mask ``[out, in]``, column by column.

    Args:
        weight: ``[out, in]``; with ``update`` it is changed in place, pruned and corrected.
        hessian: H ``[in, in]`` without damping.
        n, m: keep n of m.
        update: whether weights are updated; if not, the same loop only chooses.
    """
    dead = hessian.diagonal() == 0
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1
    if update:
        weight[:, dead] = 0
    return prune_columns_(weight, inverse_factor(hessian), n, m, update)


def prune_columns_(weight: Tensor, factor: Tensor, n: int, m: int, update: bool) -> Tensor:
    """The loop of :func:`sparsegpt_` given the factor of the inverse Hessian, ``[in, in]``."""
    width, mask = weight.shape[1], torch.ones_like(weight, dtype=torch.bool)
    block_size = max(BLOCK_SIZE // m, 1) * m  # no group straddles two blocks
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        block, upper = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        pruned = torch.zeros_like(block, dtype=torch.bool)
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        for j in range(stop - start):
            if j % m == 0:
                scores = block[:, j : j + m] ** 2 / upper.diagonal()[j : j + m] ** 2
                pruned.scatter_(1, j + scores.topk(m - n, dim=1, largest=False).indices, True)
            if update:
                kept[:, j] = block[:, j].masked_fill(pruned[:, j], 0)
                errors[:, j] = (block[:, j] - kept[:, j]) / upper[j, j]
                block[:, j:] -= errors[:, j, None] @ upper[j, j:][None]
        mask[:, start:stop] = ~pruned
        if update:
            weight[:, start:stop] = kept
            weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return mask


def magnitude(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask ``[out, in]`` that keeps the largest |w| of each group."""
    return _by_group(weight.abs(), n, m)


def wanda(weight: Tensor, norms: Tensor, n: int, m: int) -> Tensor:
    """The mask ``[out, in]`` by |w| times the norm ``[in]`` of each input."""
    return _by_group(weight.abs() * norms, n, m)


def _by_group(scores: Tensor, n: int, m: int) -> Tensor:
    mask = torch.ones_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], m):
        dropped = scores[:, start : start + m].topk(m - n, dim=1, largest=False).indices
        mask.scatter_(1, start + dropped, False)
    return mask


def prune_magnitude(weight: Tensor, statistic: Any, pattern: NMPattern, *, update_weights: bool, **_: Any) -> Pruned:
    """:func:`magnitude` as one of the library's methods."""
    return Pruned(magnitude(weight, pattern.n, pattern.m))


def prune_wanda(weight: Tensor, statistic: Any, pattern: NMPattern, *, update_weights: bool, **_: Any) -> Pruned:
    """:func:`wanda` as one of the library's methods; ``statistic`` is an ``InputNorm``."""
    return Pruned(wanda(weight, statistic.sum_of_squares.sqrt(), pattern.n, pattern.m))


def prune_sparsegpt(weight: Tensor, statistic: Any, pattern: NMPattern, *, update_weights: bool, **_: Any) -> Pruned:
    """:func:`sparsegpt_` as one of the library's methods; ``statistic`` is a :class:`PlainHessian`."""
    weight = weight.clone()
    mask = sparsegpt_(weight, statistic.mean, pattern.n, pattern.m, update_weights)
    return Pruned(mask, weight if update_weights else None)
