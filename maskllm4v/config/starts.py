"""Which rows' masks others may start from: one-shot, learned and updated rows make chains, each with a first link."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment


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
        passed, source = [row], experiment.mask_row(row)
        while source is not None and source not in priors:
            if source in passed:
                raise ValueError(f"{row}: its masks come from itself: {' ← '.join((*passed, source))}")
            passed.append(source)
            source = experiment.mask_row(source)
    for row, made in learned.items():
        if made.weights == "updated" and not experiment.updates_weights(made.prior):
            raise ValueError(f"learned.{row}.weights is 'updated', but prior {made.prior!r} updates none")
        if made.weights == "dense" and made.prior in updated and experiment.updates_weights(made.prior):
            raise ValueError(
                f"learned.{row}.prior is {made.prior!r}, whose weights are updated: say weights: updated, or name "
                f"{updated[made.prior].masks!r}, which has the same masks"
            )
