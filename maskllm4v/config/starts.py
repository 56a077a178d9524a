"""Which rows' masks others may start from: one-shot, learned and updated rows make chains, each with a first link."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment

# Those of maskllm4v.sparsity.patterns, which imports torch.
MAX_CANDIDATES, MAX_WIDE = 70, 16


def check_patterns(experiment: Experiment) -> None:
    """Raise ``ValueError`` where a row's pattern is none, or learned with more logits than there may be."""
    for row in experiment.rows:
        n, m = map(int, (experiment.row(row).pattern or "1:2").split(":"))
        if not 1 <= n < m or (m > MAX_WIDE and math.comb(m, n) > MAX_CANDIDATES):
            raise ValueError(
                f"pattern of {row} is '{n}:{m}'; allowed: N:M with 1 <= N < M and M <= {MAX_WIDE}, or few candidates"
            )
        learned = experiment.learned.get(row)
        if math.comb(m, n) > MAX_CANDIDATES and learned is not None and learned.gate == "candidates":
            raise ValueError(f"learned.{row}.gate is 'candidates', too many for {n}:{m}; allowed: 'positions'")


def check_starts(experiment: Experiment) -> None:
    """Raise ``ValueError`` where a learned or updated row has nothing to start from, or not what it asks for."""
    priors, learned, updated = experiment.priors, experiment.learned, experiment.updated
    starts = {("learned", row, "prior"): made.prior for row, made in learned.items()}
    starts |= {("updated", row, "masks"): made.masks for row, made in updated.items()}
    for (section, row, key), start in starts.items():
        allowed = (*priors, *(updated if section == "learned" else learned))
        if start not in allowed:
            raise ValueError(f"{section}.{row}.{key} is {start!r}; allowed: {', '.join(allowed) or '(no priors)'}")
    for row in (*learned, *updated):
        passed, source = [row], experiment.row(row).source
        while source is not None:
            if source.key in passed:
                raise ValueError(f"{row}: its masks come from itself: {' ← '.join((*passed, source.key))}")
            passed.append(source.key)
            source = source.source
    for row, made in learned.items():
        if made.weights == "updated" and not experiment.row(made.prior).updates_weights:
            raise ValueError(f"learned.{row}.weights is 'updated', but prior {made.prior!r} updates none")
        if made.weights == "dense" and made.prior in updated and experiment.row(made.prior).updates_weights:
            raise ValueError(
                f"learned.{row}.prior is {made.prior!r}, whose weights are updated: say weights: updated, or name "
                f"{updated[made.prior].masks!r}, which has the same masks"
            )
