"""What rows cost on one machine: the tables' cost column, from ``reports/benchmarks/table_cost.json``.

The benchmarks write that file (``python -m benchmarks.table_cost``). It is no record: nothing reproduces a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskllm4v.config import Experiment, FinetunedRow, LearnedRow
from maskllm4v.reporting.marks import MARKDOWN, Marks
from maskllm4v.utils.io import read_json

FOLDER = "benchmarks"  # in the reports


def benchmark(name: str, reports: Path) -> dict[str, Any] | None:
    """What a benchmark wrote, or None if nobody ran it."""
    path = reports / FOLDER / f"{name}.json"
    return dict(read_json(path)) if path.exists() else None


def row_costs(table: str, reports: Path) -> dict[str, float]:
    """Seconds for one seed, by row; rows that were not measured are absent."""
    rows = _of_table(table, reports).get("rows", {})
    return {row: float(cost["seconds"]) for row, cost in rows.items()}


def whole_costs(experiment: Experiment, costs: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the dense model to a row, those of the rows before it included, where all of them are known."""
    chains = {row: [one.key for one in experiment.row(row).chain] for row in costs}
    return {row: sum(costs[one] for one in chain) for row, chain in chains.items() if costs.keys() >= set(chain)}


def trained_length(experiment: Experiment, row: str, unit: str) -> float:
    """For how many ``"steps"`` or ``"epochs"`` something was trained from the dense model to a row."""
    trained = (one.settings for one in experiment.row(row).chain if isinstance(one, LearnedRow | FinetunedRow))
    return float(sum(getattr(settings, unit) or 0 for settings in trained))


def cost_caption(table: str, reports: Path, marks: Marks = MARKDOWN) -> str:
    """A sentence on what the column is and where it was measured; empty if it was not."""
    found = _of_table(table, reports)
    if not found:
        return ""
    return (
        "Cost: seconds for one seed on top of its dense model and prior, data loading aside, measured by "
        f"{marks.code('python -m benchmarks.table_cost')} on {marks.text(machine(found))}."
    )


def machine(found: dict[str, Any]) -> str:
    """Hardware and threads of a benchmark, in words."""
    return f"{found['hardware']}, {found['threads']} thread{'s' if found['threads'] != 1 else ''}"


def _of_table(table: str, reports: Path) -> dict[str, Any]:
    found = benchmark("table_cost", reports) or {}
    return dict(found.get("tables", {}).get(table, {}))
