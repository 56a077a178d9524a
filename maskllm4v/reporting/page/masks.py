"""What was counted of masks: how often each candidate is taken or position kept, and how seeds agree."""

from __future__ import annotations

import math

import pandas as pd

from maskllm4v.reporting.page.layers import read_diagnostics
from maskllm4v.reporting.page.results import Results
from maskllm4v.runs.paths import mask_statistics_file

PLAIN = ("row", "seed", "layer", "groups", "seed_agreement")  # columns that are no shares


def read_mask_statistics(results: Results) -> dict[str, pd.DataFrame]:
    """By row, a line a seed and layer; rows without masks are absent."""
    table = results.experiment.table
    paths = {row: mask_statistics_file(table, row, results.reports) for row in results.records}
    frames = {row: read_diagnostics({row: path}) for row, path in paths.items()}
    return {row: frame for row, frame in frames.items() if len(frame)}


def counted(frame: pd.DataFrame) -> list[str]:
    """A row's candidate masks by their bits, in the pattern's order; the positions of a group where those are too many.

    A position's name is that of a mask that keeps it alone.
    """
    return [str(column) for column in frame.columns if column not in PLAIN]


def has_positions(results: Results, row: str, frame: pd.DataFrame) -> bool:
    """Whether a row was counted by position; where there are as many candidates, they are counted."""
    return len(counted(frame)) != candidate_count(results, row)


def candidate_count(results: Results, row: str) -> int:
    """K = C(M, N) of a row's pattern."""
    n, m = _pattern(results, row)
    return math.comb(m, n)


def kept_share(results: Results, row: str) -> float:
    """N / M of a row's pattern."""
    n, m = _pattern(results, row)
    return n / m


def _pattern(results: Results, row: str) -> tuple[int, int]:
    n, m = str(results.lines[row]["pattern"]).split(":")
    return int(n), int(m)
