"""The table that everything else on a page explains, and the sentence above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from maskllm4v.config.metrics import Metric
from maskllm4v.reporting.aggregate import best_row
from maskllm4v.reporting.page.results import KINDS, Results
from maskllm4v.reporting.tables import LABELS, number, result_cells, result_headers, significant

SPARSE = tuple(kind for kind in KINDS if kind != "dense")
DELTA, COST = "delta", "cost"  # what cells are marked with that show no metric


@dataclass(frozen=True)
class Cell:
    """``metric`` is what it shows, or empty; ``order`` is what its column is sorted by."""

    text: str
    metric: str = ""
    order: str = ""
    best: bool = False


@dataclass(frozen=True)
class Winner:
    """A row as sentences and tiles show it; texts as in the table."""

    row: str
    label: str
    kind: str
    mean: str
    delta: str
    cost: str


def headers(results: Results) -> list[tuple[str, str]]:
    """Of the columns: text, and ``number`` or ``text``, which is how to sort it."""
    texts = result_headers(results.metrics)
    return [(text, "text" if place < LABELS else "number") for place, text in enumerate(texts)]


def table_lines(results: Results) -> dict[str, list[Cell]]:
    """By row, a cell for each column of ``table.md``; the first is the label."""
    metrics = results.metrics
    numbers = [metrics.headline.name, DELTA, *(metric.name for metric in metrics.columns[1:])]
    best = {name: _best(results, name) for name in numbers}
    lines = {}
    for row, line in results.lines.items():
        texts = result_cells(line, metrics)
        measured = zip(numbers, texts[LABELS:-1], strict=True)
        lines[row] = [
            *(Cell(text) for text in texts[:LABELS]),
            *(Cell(text, name, _order(line[f"{name}_mean"]), row in best[name]) for name, text in measured),
            Cell(texts[-1], COST, _order(line["cost_seconds"])),
        ]
    return lines


def _best(results: Results, name: str) -> set[str]:
    """The sparse rows whose mean is best as the table shows it, all of them if several look the same."""
    metric = results.metrics.headline if name == DELTA else results.metrics[name]
    means = {
        row: float(line[f"{name}_mean"])
        for row, line in results.lines.items()
        if line["pattern"] != "dense" and pd.notna(line[f"{name}_mean"])
    }
    if not means:
        return set()
    first = max(means.values()) if metric.better == "higher" else min(means.values())
    return {row for row, mean in means.items() if _mean(mean, metric) == _mean(first, metric)}


def _mean(mean: float, metric: Metric) -> str:
    return number(mean, float("nan"), metric.digits)


def _order(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:.8g}"


def winner(results: Results, kinds: Sequence[str] = SPARSE) -> Winner | None:
    """The best sparse row of some kinds; None where none was measured."""
    row = best_row(results.experiment, results.table[results.table["kind"].isin(kinds)])
    return None if row is None else described(results, row)


def described(results: Results, row: str) -> Winner:
    """A measured row."""
    line = results.lines[row]
    metric = results.metrics.headline
    return Winner(
        row=row,
        label=results.labels[row],
        kind=str(line["kind"]),
        mean=number(line[f"{metric.name}_mean"], line[f"{metric.name}_std"], metric.digits),
        delta=number(line["delta_mean"], line["delta_std"], metric.digits, sign=True),
        cost=significant(line["cost_seconds"]),
    )
