"""What a page is made of: one table's records, as its parts read them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.config.metrics import TaskMetrics
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.reporting.benchmarks.costs import cost_caption, row_costs
from maskllm4v.reporting.marks import NONE
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.receipts import claim
from maskllm4v.reporting.tables import caption

KINDS = {
    "dense": "dense",
    "oneshot": "one-shot",
    "learned": "learned masks, frozen weights",
    "updated": "weights updated in closed form",
    "hybrid": "masks learned on updated weights",
    "finetuned": "control, weights trained on",
}


@dataclass(frozen=True)
class Results:
    """Current records of a table, and where curves and diagnostics of its rows lie."""

    experiment: Experiment
    reports: Path

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        return current_records(self.experiment, self.reports)

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """All settings of the rows that have a record, those at their defaults, too."""
        return {row: self.experiment.row(row).record_settings(defaults=True) for row in self.records}

    @cached_property
    def table(self) -> pd.DataFrame:
        return aggregate(self.experiment, self.records, row_costs(self.experiment.table, self.reports))

    @cached_property
    def lines(self) -> dict[str, dict[Hashable, Any]]:
        """Lines of the table by row."""
        return {str(line["row"]): line for line in self.table.to_dict("records")}

    @cached_property
    def measured(self) -> list[str]:
        """Rows whose headline is known, in the table's order."""
        return [row for row, line in self.lines.items() if pd.notna(line[f"{self.metrics.headline.name}_mean"])]

    @property
    def metrics(self) -> TaskMetrics:
        return metrics_of(self.experiment.task.name)

    @cached_property
    def labels(self) -> dict[str, str]:
        """What charts call each row: its label, its prior, and its pattern where the table has several."""
        several = len({row.pattern for row in self.experiment.all_rows} - {None}) > 1
        return {
            row.key: (f"{row.pattern} " if several and row.pattern is not None else "")
            + row.label
            + ("" if row.source is None else f" ← {row.source.label}")
            for row in self.experiment.all_rows
        }

    @cached_property
    def numbers(self) -> dict[str, int]:
        """What rows are called where there is no room for a label: their place in the table, from 1."""
        return {row: number for number, row in enumerate(self.experiment.rows, 1)}

    @property
    def dense(self) -> str:
        return self.experiment.dense.row

    @cached_property
    def caption(self) -> str:
        """The table's, without marks."""
        cost = cost_caption(self.experiment.table, self.reports, NONE)
        reproduced = claim(self.experiment, self.reports)
        return caption(self.experiment, self.metrics, self.records, cost, reproduced, NONE).strip()

    def kind(self, row: str) -> str:
        return str(self.lines[row]["kind"])

    def seeds(self, row: str, metric: str) -> dict[int, float]:
        """A metric by seed; empty where it was not measured."""
        record = self.records.get(row, {"metrics": {}})
        found = {int(seed): values.get(metric) for seed, values in record["metrics"].items()}
        return {seed: float(value) for seed, value in sorted(found.items()) if value is not None}
