"""What was counted of masks: how often each candidate is taken, and how seeds agree."""

from __future__ import annotations

import pandas as pd

from maskllm4v.layout import mask_statistics_file
from maskllm4v.reporting.page.layers import read_diagnostics
from maskllm4v.reporting.page.results import Results

PLAIN = ("row", "seed", "layer", "groups", "seed_agreement")  # columns that are no candidates


def read_mask_statistics(results: Results) -> dict[str, pd.DataFrame]:
    """By row, a line a seed and layer; rows without masks are absent."""
    table = results.experiment.table
    paths = {row: mask_statistics_file(table, row, results.reports) for row in results.records}
    frames = {row: read_diagnostics({row: path}) for row, path in paths.items()}
    return {row: frame for row, frame in frames.items() if len(frame)}


def candidates(frame: pd.DataFrame) -> list[str]:
    """A row's candidate masks by their bits, in the pattern's order."""
    return [str(column) for column in frame.columns if column not in PLAIN]
