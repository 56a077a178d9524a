"""SparseGPT: pruning by the layer's Hessian (Frantar & Alistarh 2023, arXiv 2301.00774).

With H = 2/n·Σ x xᵀ + damping and U the upper Cholesky factor of H⁻¹, a group's candidates are ranked by
w²/U_jj²; with weight update, the error e = (w − q)/U_jj of each column is passed on to the columns to
its right. With J the reversal of the columns and J H J = L Lᵀ, U = J L⁻¹ J: one factorisation and a
triangular inverse instead of two factorisations and a full inverse; where weights are not updated, diag U alone,
the reversal of 1/diag L.

The update is the paper's, column after column, but lazier than its blocks of 128 columns: errors reach the
rest of a group one column at a time, the rest of 32 columns a group at a time, and so on upwards, in matrix
products that grow. Weights lie as ``[in, out]`` meanwhile, so that a column of the layer is a row in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from maskllm4v.oneshot.activations.statistics import WIDE, Hessian, full_float32
from maskllm4v.oneshot.methods.result import Pruned
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import DataError, PatternError

DAMPING = 0.01  # share of the mean diagonal, as in the original
BLOCK_SIZES = (128, 32)  # columns between two propagations to the rest of the row, and of the block
MAX_RETRIES = 6
STEP = 192  # columns between two products while a matrix is factorised or inverted


def prune_sparsegpt(
    weight: Tensor, statistic: Hessian, pattern: NMPattern, *, update_weights: bool, layer: str, seed: int
) -> Pruned:
    """Mask by w²/U_jj²; with ``update_weights``, also correct the weights to the right of each pruned one.

    Args:
        weight: ``[out, in]``; not changed.
        statistic: of the layer's inputs.
        pattern: the pattern.
        update_weights: see above; the weights returned are then zero where pruned.
        layer: name for messages.
        seed: not used.

    Raises:
        PatternError: the pattern does not fit, or weights are not finite.
        DataError: see :func:`reversed_cholesky`.
    """
    pattern.check_fits(weight.shape[1], layer)
    hessian, dead = live_hessian(statistic)
    with full_float32(weight.device):
        factor = reversed_cholesky(hessian, layer)
        if not update_weights:
            root = factor.diagonal().flip(0)
            return Pruned(pattern.topn_mask(weight.to(hessian.dtype).square() * root.square(), layer))
        columns = live_columns(weight, dead, hessian.dtype)
        mask = prune_columns(columns, upper_factor(factor), pattern)
    if torch.isnan(columns.amax()):
        raise PatternError(f"layer {layer!r}: updated weights contain NaN, so no mask can be chosen")
    return Pruned(mask, columns.t().to(weight.dtype))


def live_hessian(statistic: Hessian) -> tuple[Tensor, Tensor]:
    """H ``[in, in]``, and which inputs never fire ``[in]``: their weights do not matter, and H gets a diagonal of 1."""
    hessian = statistic.mean
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    return hessian, dead


def live_columns(weight: Tensor, dead: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight ``[out, in]`` as ``[in, out]``, zero where inputs never fire."""
    columns = weight.t().to(dtype, copy=True, memory_format=torch.contiguous_format)
    columns[dead] = 0
    return columns


def reversed_cholesky(hessian: Tensor, layer: str = "weight", damping: float = DAMPING) -> Tensor:
    """L with J H J = L Lᵀ of the damped Hessian ``[in, in]``, J the reversal; what is above its diagonal is no part.

    ``damping`` is a share of the mean diagonal. If rounding has cost positive definiteness, it grows tenfold at a
    time, with a warning.

    Raises:
        DataError: the Hessian is not finite, or no damping helps.
    """
    # A sum is far cheaper than a look at each element, and not finite if one of them is not.
    if not torch.isfinite(hessian.sum()) and not torch.isfinite(hessian).all():
        raise DataError(f"layer {layer!r}: calibration gave inputs that are not finite")
    for _ in range(MAX_RETRIES):
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * damped.diagonal().mean())
        factor, exists = _cholesky(damped)
        if exists:
            return factor
        warnings.warn(f"layer {layer!r}: Hessian not positive definite at damping {damping:g}; raised", stacklevel=2)
        tried, damping = damping, max(10 * damping, DAMPING)
    raise DataError(f"layer {layer!r}: Hessian is not positive definite even at damping {tried:g}")


def _cholesky(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower factor, perhaps in the place of ``matrix`` and below what was there; and whether there is one."""
    size = matrix.shape[0]
    if size < WIDE or matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, not int(info)
    # LAPACK's own takes three times as long for thousands of columns.
    for start in range(0, size, STEP):
        stop = min(start + STEP, size)
        corner, below = matrix[start:stop, start:stop], matrix[stop:, start:stop]
        left = matrix[start:stop, :start].t()
        corner.addmm_(left.t(), left, alpha=-1)
        below.addmm_(matrix[stop:, :start], left, alpha=-1)
        factor, info = torch.linalg.cholesky_ex(corner)
        if int(info):
            return matrix, False
        corner.copy_(factor)
        below.copy_(torch.linalg.solve_triangular(factor.t(), below, upper=True, left=False))
    return matrix, True


def upper_factor(factor: Tensor) -> Tensor:
    """U = J L⁻¹ J, the upper Cholesky factor of the inverse Hessian ``[in, in]``, from :func:`reversed_cholesky`.

    By substitution into 1, block after block, past what stays zero: a third of the work of solving for all of 1.
    """
    size, inverse = factor.shape[0], torch.zeros_like(factor)
    for start in range(0, size, STEP):
        stop = min(start + STEP, size)
        identity = torch.eye(stop - start, dtype=factor.dtype, device=factor.device)
        corner = torch.linalg.solve_triangular(factor[start:stop, start:stop], identity, upper=False)
        inverse[start:stop, :start] = corner @ inverse[start:stop, :start]
        inverse[start:stop, start:stop] = corner
        inverse[stop:, :stop].addmm_(factor[stop:, start:stop], inverse[start:stop, :stop], alpha=-1)
    return inverse.flip(0, 1)


def prune_columns(w: Tensor, u: Tensor, pattern: NMPattern) -> Tensor:
    """SparseGPT's loop (the paper's Algorithm 1) given the factor of the inverse Hessian.

    Args:
        w: ``[in, out]``, the weight transposed; changed in place: pruned, and corrected.
        u: U ``[in, in]``, upper triangular, of the same dtype.
        pattern: the pattern.

    Returns:
        Boolean mask ``[out, in]``. Each group is chosen on weights that are up to date at its first column;
        ties go to the lexicographically first candidate. Where weights are not finite, it means nothing.
    """
    return _Columns(w, u, pattern.m, _Ranking(pattern, w)).prune()


def correct_columns(w: Tensor, u: Tensor, mask: Tensor, pattern: NMPattern) -> None:
    """The same loop, in place, where the mask ``[out, in]`` is given: it then is the update alone."""
    _Columns(w, u, pattern.m, _Given(mask, w, pattern.m)).prune()


class _Columns:
    """One layer while it is pruned: what was pruned in the block at hand, and its errors still to be passed on.

    A group takes some twenty calls on few numbers, so all views that they need are made beforehand, at once.
    """

    def __init__(self, w: Tensor, u: Tensor, m: int, choose: Callable[[int, Tensor, Tensor, Tensor], None]) -> None:
        width, rows = w.shape
        # Blocks end where a group ends, so that each group is chosen on weights that are up to date.
        self.block, *smaller = (max(size // m, 1) * m for size in BLOCK_SIZES)
        self.w, self.u_transposed, self.steps = w, u.t(), (*smaller, m)
        self.errors, self.pruned = w.new_empty(2, min(self.block, width), rows)  # pruned: 1, else 0
        self.choose = choose
        # By group of the layer, and by group of the block.
        self.groups = list(zip(w.split(m), u.diagonal()[:, None].contiguous().split(m), strict=True))
        self.results = list(zip(self.pruned.split(m), self.errors.split(m), strict=True))
        # By column; and by column of a group, then by group: the columns after it and the factors of its error.
        self.columns, self.column_errors = w.unbind(), self.errors.unbind()
        self.column_errors_as_matrix = self.errors[:, None].unbind()
        slabs = w.view(-1, m, rows)
        triangles = u.view(len(slabs), m, len(slabs), m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.after = [slabs[:, j + 1 :].unbind() for j in range(m - 1)]
        self.factors = [triangles[:, j, j + 1 :, None].unbind() for j in range(m - 1)]

    def prune(self) -> Tensor:
        """The mask ``[out, in]``; the weights are changed on the way."""
        width = self.w.shape[0]
        pruned = torch.empty(self.w.shape, dtype=torch.bool, device=self.w.device)
        for start in range(0, width, self.block):
            stop = min(start + self.block, width)
            self._span(start, stop, 0, self.steps)
            pruned[start:stop] = self.pruned[: stop - start]
            self.w[start:stop].addcmul_(self.w[start:stop], self.pruned[: stop - start], value=-1)
            self._pass_on(start, stop, width, 0)
        return pruned.t().contiguous().logical_not_()

    def _span(self, start: int, stop: int, offset: int, steps: tuple[int, ...]) -> None:
        """Prune the columns from ``start`` to ``stop``, which begin at ``offset`` of their block."""
        for first in range(start, stop, steps[0]):
            last, at = min(first + steps[0], stop), offset + first - start
            if len(steps) > 1:
                self._span(first, last, at, steps[1:])
            else:
                self._group(first, at)
            self._pass_on(first, last, stop, at)

    def _group(self, start: int, offset: int) -> None:
        """Let ``choose`` say which weights ``[M, out]`` of a group go, then find its errors column by column."""
        m = self.steps[-1]
        group = start // m
        (w, diagonal), (pruned, errors) = self.groups[group], self.results[offset // m]
        self.choose(group, w, diagonal, pruned)
        torch.div(pruned, diagonal, out=errors)
        for j in range(m):
            self.column_errors[offset + j].mul_(self.columns[start + j])
            if j < m - 1:
                error = self.column_errors_as_matrix[offset + j]
                self.after[j][group].addmm_(self.factors[j][group], error, alpha=-1)

    def _pass_on(self, start: int, stop: int, end: int, offset: int) -> None:
        """Correct the columns from ``stop`` to ``end`` for the errors of those from ``start`` to ``stop``."""
        if stop < end:
            errors = self.errors[offset : offset + stop - start]
            self.w[stop:end].addmm_(self.u_transposed[stop:end, start:stop], errors, alpha=-1)


class _Ranking:
    """Which weights of a group of every row to prune, in few calls on ``[M, out]``.

    A weight's rank counts those that beat it: of two weights the later one wins only if its score is larger.
    """

    def __init__(self, pattern: NMPattern, like: Tensor) -> None:
        n, m = pattern.n, pattern.m
        self.scores, self.ranks, later_wins = like.new_empty(3, m, like.shape[1])
        # Row i of the ranks starts at i − N: weight i loses to each weight before it unless it wins.
        self.start = torch.arange(-n, m - n, dtype=like.dtype, device=like.device)[:, None]
        self.zero = like.new_zeros(1)
        self.pairs = [
            (self.scores[d:], self.scores[:-d], later_wins[d:], self.ranks[:-d], self.ranks[d:]) for d in range(1, m)
        ]

    def __call__(self, group: int, w: Tensor, diagonal: Tensor, pruned: Tensor) -> None:
        torch.div(w, diagonal, out=self.scores)
        self.scores.abs_()  # in the order of its square
        self.ranks.copy_(self.start)
        for later, earlier, later_wins, of_earlier, of_later in self.pairs:
            torch.gt(later, earlier, out=later_wins)
            of_earlier.add_(later_wins)
            of_later.sub_(later_wins)
        torch.ge(self.ranks, self.zero, out=pruned)


class _Given:
    """The same of a mask that somebody else has chosen."""

    def __init__(self, mask: Tensor, like: Tensor, m: int) -> None:
        self.pruned = (~mask).t().to(like.dtype, memory_format=torch.contiguous_format).split(m)

    def __call__(self, group: int, w: Tensor, diagonal: Tensor, pruned: Tensor) -> None:
        pruned.copy_(self.pruned[group])
