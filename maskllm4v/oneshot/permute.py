"""In which order hidden channels keep the most under N:M, found before masks are chosen.

Pool & Yu 2021, "Channel Permutations for N:M Sparsity", permute the columns of a weight so that the largest values
meet small ones. Here as there two channels of different groups change places as long as that pays. What a swap gains
has a closed form: in a group without its member c, let t be the N-th largest score of a row; with channel j in c's
place the row keeps its N-1 largest others and max(t, s_j). Summed over rows, max(t, s) = (t + s + |t - s|) / 2 is a
matrix of L1 distances, so that one call gives the gains of all swaps. Groups are independent, so the best swap of
every pair of groups can be taken at once, as long as no group is touched twice.

Rows of a weight can be permuted freely, as its groups lie along the columns: the order of a layer's inputs is chosen
for that layer alone, and that of each expert of a stack for that expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.sequential import part_statistics
from maskllm4v.oneshot.activations.statistics import InputNorm
from maskllm4v.sparsity.calibration import Calibration, Forward, as_parts, check_materialised
from maskllm4v.sparsity.channels import Channels
from maskllm4v.sparsity.parameters import Matrix
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.permutation import find_channels
from maskllm4v.sparsity.rollback import all_or_nothing
from maskllm4v.sparsity.survey import Exclude, OnMisfit, survey
from maskllm4v.utils.errors import ConfigError, PatternError
from maskllm4v.utils.progress import bar, note
from maskllm4v.utils.text import few

SWEEPS = 20  # over all pairs of groups
WORTH = 1e-6  # of a group's mean score: swaps that gain less are not taken


class Permutations(dict[str, Tensor]):
    """Orders of channels by the name of the matrix that reads them: ``[in]``, or ``[experts, in]`` of a stack.

    Attributes:
        best: matrices whose channels stand in the best order already.
        fixed: those to be pruned whose channels cannot be permuted. A warning names those of them that lie in a known
            kind of block, and says why.
    """

    best: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self) + len(self.best) + len(self.fixed)
        lines = [f"permuted the input channels of {len(self):,} layers (of {count:,})"]
        if self.best:
            lines.append(f"these stand in the best order already: {few(self.best)}")
        if self.fixed:
            lines.append(f"those of others cannot move, or are not known to: {few(self.fixed)}")
        return "\n".join(lines)


def permute_channels_(
    model: nn.Module,
    pattern: NMPattern | str | tuple[int, int],
    *,
    calibration: Iterable[Any] | Tensor | Calibration | None = None,
    forward: Forward | None = None,
    exclude: Exclude = (),
    on_misfit: OnMisfit = "error",
    sweeps: int = SWEEPS,
    tell: Callable[[str], object] = note,
) -> Permutations:
    """Permute a dense model's hidden channels, in place, so that N:M masks keep more; its outputs stay the same.

    After Pool and Yu (NeurIPS 2021).

    ::

        permutations = maskllm4v.permute_channels_(model, "2:4", exclude=["head"])
        masks = maskllm4v.prune(model, "magnitude", pattern="2:4", exclude=["head"])

    Hidden units of MLPs move freely, those of each expert on their own, value channels within their head; see
    :mod:`maskllm4v.sparsity.permutation`.

    Args:
        model: dense; changed in place.
        pattern: e.g. ``"2:4"``.
        calibration, forward: as in :func:`maskllm4v.prune`. With it, a weight's score is Wanda's, |w|·‖x‖; else |w|.
        exclude: layers that stay dense, as in :func:`maskllm4v.prune`: no order is chosen for them.
        on_misfit: as there.
        sweeps: bounds the work, see :func:`best_order`.
        tell: called with the report of what was permuted and what cannot be; by default a terminal shows it.

    Returns:
        Indices ``[in]`` by the name of the matrix that reads the channels, or ``[experts, in]`` of a stack: channel
        ``permutation[i]`` of the given model stands in place i now. Those whose order is the best already are left out.
        :func:`maskllm4v.invert_permutations` gives what takes them back. After an error, or Ctrl-C, the model is as it
        was.

    Warns:
        Channels of a known kind of block cannot be permuted: they are used elsewhere, or the block's outputs change.
        No token of the calibration comes to an expert, whose order goes by |w|.

    Raises:
        ConfigError: the model has no channels that can be permuted, or has masks already.
        DataError: no batch, or none that reaches a layer.
        PatternError: the pattern does not fit a layer, or scores are not finite.
    """
    pattern = NMPattern(pattern)
    layers = survey(model, pattern, exclude=exclude, on_misfit=on_misfit).prunable
    check_materialised(layers)
    channels = find_channels(model, layers)
    if not channels:
        raise ConfigError("no layer to prune reads channels that can be permuted: hidden units or values of attention")
    with all_or_nothing(model) as rollback:
        norms: dict[str, Any] = {}
        if calibration is not None:
            readers, parts = {name: layers[name] for name in channels}, as_parts(calibration, forward)
            with closing(part_statistics(model, readers, parts, InputNorm, propagate="dense")) as units:
                for unit in units:
                    norms |= unit
        found = Permutations()
        for name in bar(channels, "permutation"):
            order = _order(layers[name], channels[name], norms.get(name), pattern, sweeps)
            if not order.equal(torch.arange(order.shape[-1]).expand(order.shape)):
                found[name] = order
        found.best = tuple(name for name in channels if name not in found)
        found.fixed = tuple(name for name in layers if name not in channels)
        for name, order in found.items():
            for place in channels[name].places:
                rollback.keep(place.tensor)
            channels[name].permute_(order)
        tell(str(found))
        return found


def _order(matrix: Matrix, channels: Channels, norms: Any, pattern: NMPattern, sweeps: int) -> Tensor:
    """The order of a matrix's inputs by the statistic of them, if any; of each expert's, ``[experts, in]``."""
    rows = matrix.rows.detach()

    def order(weight: Tensor, norm: InputNorm | None) -> Tensor:
        scores = weight.double().abs()
        if norm is not None:
            scores *= norm.sum_of_squares.double().sqrt()
        return best_order(scores, pattern, parts=channels.parts, sweeps=sweeps, layer=matrix.name)

    if channels.experts is None:
        return order(rows, norms)
    seen: list[InputNorm | None] = [None] * channels.experts
    if norms is not None:
        seen = [norm if norm.rows else None for norm in (norms if isinstance(norms, list) else [norms])]
        if idle := [i for i, norm in enumerate(seen) if norm is None]:
            warnings.warn(
                f"layer {matrix.name!r}: no token came to {len(idle)} of {len(seen)} experts, permuted by magnitude: "
                f"{', '.join(map(str, idle))}",
                stacklevel=3,
            )
    return torch.stack([order(weight, norm) for weight, norm in zip(rows, seen, strict=True)])


def best_order(
    scores: Tensor, pattern: NMPattern, *, parts: int = 1, sweeps: int = SWEEPS, layer: str = "weight"
) -> Tensor:
    """An order of columns that no swap of two would improve, unless the sweeps are over before.

    Args:
        scores: ``[out, in]``, at least 0: what keeping a weight is worth.
        pattern: keeps the N highest of each group.
        parts: columns stay within so many equal parts.
        sweeps: at most so many times all gains are computed (``in² · out`` operations at first; later only for groups
            that have changed), and up to ``in / M / 2`` swaps made.
        layer: name for messages.

    Returns:
        Indices ``[in]``, on the CPU: column ``order[i]`` comes to stand in place i. The sum of the scores kept is never
        less than in the order given.

    Raises:
        PatternError: the pattern does not fit, or scores are not finite.
    """
    pattern.check_fits(scores.shape[1], layer)
    if not bool(torch.isfinite(scores).all()):
        raise PatternError(f"layer {layer!r}: scores are not finite, so no order of its inputs can be chosen")
    search = _Search(scores, pattern, parts)
    for _ in range(sweeps):
        if not search.sweep():
            break
    return search.order.cpu()


class _Search:
    """Swaps on one layer. Everything is kept by column, wherever that stands at the moment."""

    def __init__(self, scores: Tensor, pattern: NMPattern, parts: int) -> None:
        count, device = scores.shape[1], scores.device
        self.n, self.m, self.groups = pattern.n, pattern.m, count // pattern.m
        self.columns = scores.double().t().contiguous()  # [in, out]
        self.sums = self.columns.sum(1)
        self.order = torch.arange(count, device=device)
        self.stale = torch.arange(self.groups, device=device)  # groups that have changed since they were looked at
        self.kept = self.columns.new_zeros(self.groups)  # the score of each group
        self.others = self.columns.new_zeros(count)  # Σ over rows of the N-1 largest of a column's group without it
        self.instead = self.columns.new_zeros(count, count)  # [c, j]: Σ max(t, s_j), with j in the place of c
        part = self.order // (count // parts)
        self.apart = None if parts == 1 else part[:, None] != part

    def sweep(self) -> bool:
        """Look at all swaps and take the best ones, no group twice; False if none is worth it."""
        self._look()
        gains, which = self._gains()
        worth = WORTH * float(self.kept.mean())
        touched: list[int] = []
        while True:
            best = int(gains.argmax())
            a, b = divmod(best, self.groups)
            if not float(gains[a, b]) > worth:
                break
            i, j = divmod(int(which[a, b]), self.m)
            i, j = a * self.m + i, b * self.m + j
            self.order[[i, j]] = self.order[[j, i]]
            gains[[a, b]] = gains[:, [a, b]] = -torch.inf
            touched += (a, b)
        self.stale = torch.tensor(sorted(touched), device=self.order.device)
        return bool(touched)

    def _look(self) -> None:
        """Bring everything up to date where groups have changed."""
        members = self.order.view(-1, self.m)[self.stale]
        ranked = list(self.columns[members].unbind(1))  # M of [groups, out]
        for i in range(self.n + 1):  # the N + 1 largest come to stand first; cheaper than sorting so short a dimension
            for j in range(i + 1, self.m):
                ranked[i], ranked[j] = torch.maximum(ranked[i], ranked[j]), torch.minimum(ranked[i], ranked[j])
        kept = torch.stack(ranked[: self.n]).sum(0)
        self.kept[self.stale] = kept.sum(1)
        last, following = ranked[self.n - 1], ranked[self.n]
        for column in members.t():
            score = self.columns[column]
            inside = score >= last  # it is among the N largest, and without it the following one would be
            threshold = torch.where(inside, following, last)
            self.others[column] = (kept - torch.where(inside, score, last)).sum(1)
            distance = torch.cdist(threshold, self.columns, p=1)
            self.instead[column] = (distance + threshold.sum(1)[:, None] + self.sums) / 2

    def _gains(self) -> tuple[Tensor, Tensor]:
        """By pair of groups ``[G, G]``: what their best swap gains, and which it is, ``i · M + j``."""
        mine = self.others.clone()
        mine[self.order] -= self.kept.repeat_interleave(self.m)
        gains = self.instead + self.instead.t()
        gains += mine[:, None]
        gains += mine
        if self.apart is not None:
            gains.masked_fill_(self.apart, -torch.inf)
        by_group = gains[self.order][:, self.order].unflatten(0, (-1, self.m)).unflatten(2, (-1, self.m))
        best, which = by_group.transpose(1, 2).flatten(2).max(2)
        best.fill_diagonal_(-torch.inf)
        return best, which
