"""What figures call a row, and the colour of its kind."""

from __future__ import annotations

from maskllm4v.config import Experiment

COLOURS = {  # by kind, see :func:`maskllm4v.reporting.aggregate.aggregate`
    **{"dense": "#4c4c4c", "oneshot": "#9db4c8", "learned": "#2a6f97"},
    **{"updated": "#6f9f8d", "hybrid": "#8f5b86", "finetuned": "#c9a66b"},
}


def row_labels(experiment: Experiment) -> dict[str, str]:
    """What figures call each row: its label, its prior, and its pattern where the table has several."""
    patterns = {row.pattern for row in experiment.all_rows} - {None}
    labels = {}
    for row in experiment.all_rows:
        before = f"{row.pattern} " if row.pattern is not None and len(patterns) > 1 else ""
        labels[row.key] = before + row.label + ("" if row.source is None else f" ← {row.source.label}")
    return labels
