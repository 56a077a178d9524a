"""What pruning breaks first: parts of the images and single classes, each row against the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import best_row, seed_metrics
from maskllm4v.reporting.marks import escaped, markdown
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.tables import number

CLASSES = 3  # in Markdown: those that lose the most
DIGITS = 1


@dataclass(frozen=True)
class Part:
    """What the headline is measured of alone: ``name`` is its key in records."""

    name: str
    header: str
    is_class: bool = False


@dataclass(frozen=True)
class Breakdown:
    """The headline of parts, seed by seed.

    Attributes:
        parts: those of the images, then classes in the order of records.
        dense: of the dense model; a line a seed, a column a part.
        differences: to the dense model of the same seed; of each sparse row.
        losses: of each part, the mean of all sparse rows' differences; what gets worse is below 0.
    """

    parts: list[Part]
    dense: pd.DataFrame
    differences: dict[str, pd.DataFrame]
    losses: dict[str, float]

    def with_classes(self, most: int) -> list[Part]:
        """The parts, with no more classes than that: those that lose the most, in their order."""
        classes = [part for part in self.parts if part.is_class]
        hurt = sorted(classes, key=lambda part: self.losses[part.name])[:most]
        return [part for part in self.parts if not part.is_class or part in hurt]


def break_down(experiment: Experiment, records: Mapping[str, Mapping[str, Any]]) -> Breakdown | None:
    """What records hold of parts; None where the task measures none, or nothing is there to compare."""
    metrics = metrics_of(experiment.task.name)
    of_dense = records.get(experiment.dense.row)
    sparse = {row: record for row, record in records.items() if experiment.row(row).pattern is not None}
    if of_dense is None or not sparse:
        return None
    dense = seed_metrics(of_dense)
    prefix = metrics.by_class
    parts = [Part(metric.name, metric.header) for metric in metrics.parts if metric.name in dense]
    if prefix:
        classes = [str(name) for name in dense if str(name).startswith(prefix)]
        parts += [Part(name, name.removeprefix(prefix), is_class=True) for name in classes]
    if not parts:
        return None
    names = [part.name for part in parts]
    differences = {}
    for row, record in sparse.items():
        measured = seed_metrics(record)
        paired = dense.loc[[experiment.dense_seed(int(seed)) for seed in measured.index], names]
        differences[row] = measured.reindex(columns=names) - paired.to_numpy()
    sign = 1 if metrics.better == "higher" else -1
    means = pd.DataFrame({row: found.mean() for row, found in differences.items()}).mean(axis=1)
    return Breakdown(parts, dense[names], differences, {name: sign * float(means[name]) for name in names})


def parts_markdown(experiment: Experiment, records: Mapping[str, Mapping[str, Any]], table: pd.DataFrame) -> str:
    """A line a part, and what it means: the dense model, then rows of the table's pattern as differences to it.

    Of these the weakest one, and the best one of each kind. Empty where there is nothing to break down.
    """
    found = break_down(experiment, records)
    if found is None:
        return ""
    rows = _shown(experiment, table, list(found.differences))
    if not rows:
        return ""
    lines = []
    for part in found.with_classes(CLASSES):
        of_dense = found.dense[part.name]
        differences = (found.differences[row][part.name] for row in rows)
        cells = [
            number(of_dense.mean(), of_dense.std(), DIGITS),
            *(number(found.mean(), found.std(), DIGITS, sign=True) for found in differences),
        ]
        lines.append([f"class {part.header}" if part.is_class else part.header, *cells])
    metrics = metrics_of(experiment.task.name)
    headers = [f"{metrics.headline.header} of", *(experiment.row(row).label for row in [experiment.dense.row, *rows])]
    said = [metric.about for metric in metrics.parts if metric.about]
    said.append(f"classes: the {CLASSES} that lose the most on the whole")
    about = f"What pruning breaks first: differences to the dense model, {experiment.pattern}. {'; '.join(said)}."
    return markdown(headers, lines) + f"\n*{escaped(about)}*\n"


def _shown(experiment: Experiment, table: pd.DataFrame, rows: Sequence[str]) -> list[str]:
    """The weakest row of the table's pattern, and the best of each kind, in the table's order."""
    metrics = metrics_of(experiment.task.name)
    name = f"{metrics.headline.name}_mean"
    of_pattern = table[(table["pattern"] == experiment.pattern) & table["row"].isin(rows) & table[name].notna()]
    if of_pattern.empty:
        return []
    means = of_pattern.set_index("row")[name]
    weakest = str(means.idxmin() if metrics.better == "higher" else means.idxmax())
    best = {best_row(experiment, of_kind) for _, of_kind in of_pattern.groupby("kind")}
    return [row for row in rows if row == weakest or row in best]
