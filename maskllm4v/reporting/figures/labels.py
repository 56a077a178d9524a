"""What figures call a row, and the colour of its kind."""

from __future__ import annotations

from maskllm4v.config import Experiment

COLOURS = {  # by kind, see :func:`maskllm4v.reporting.aggregate.aggregate`
    **{"dense": "#4c4c4c", "oneshot": "#9db4c8", "learned": "#2a6f97"},
    **{"updated": "#6f9f8d", "hybrid": "#8f5b86", "finetuned": "#c9a66b"},
}


def row_labels(experiment: Experiment) -> dict[str, str]:
    """What figures call each row: its label, its prior, and its pattern where the table has several."""
    patterns = {experiment.pattern_of(row) for row in experiment.rows} - {None}
    labels = {}
    for row, label in experiment.rows.items():
        start, pattern = experiment.mask_row(row), experiment.pattern_of(row)
        before = f"{pattern} " if pattern is not None and len(patterns) > 1 else ""
        labels[row] = before + label + (f" ← {experiment.rows[start]}" if start not in (None, row) else "")
    return labels
