"""The aggregated table as Markdown, CSV and ``metrics.json``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.config.metrics import TaskMetrics
from maskllm4v.reporting.marks import MARKDOWN, Marks, markdown, strong
from maskllm4v.reporting.names import short_names

MISSING = "–"
NOT_MEASURED = "Not measured yet."
LEARNED = ("learned", "hybrid")  # kinds whose masks were learned, on frozen or on updated weights
LEAKS = "Calibrated on the reported split, which leaks"
LABELS = 4  # columns that say what a row is; then come the headline, its difference, other metrics, the cost


def number(mean: Any, std: Any, digits: int, sign: bool = False) -> str:
    """``mean ± std``; ``–`` where nothing was measured, no spread where there is one seed."""
    if pd.isna(mean):
        return MISSING
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if pd.isna(std) else f"{text} ± {std:.{digits}f}"


def significant(value: Any, digits: int = 2) -> str:
    """A number with so many significant digits and no exponent, such as 0.013, 1.2, 120; ``–`` if it is missing."""
    if pd.isna(value):
        return MISSING
    rounded = float(f"{value:.{digits}g}")
    exponent = int(f"{rounded:e}".partition("e")[2])
    return f"{rounded:.{max(0, digits - 1 - exponent)}f}"


def results_markdown(table: pd.DataFrame, metrics: TaskMetrics) -> str:
    """The table that the README shows: the headline and its difference to dense, then the other metrics."""
    rows = []
    for line in table.to_dict("records"):
        label, *cells = result_cells(line, metrics)
        rows.append([strong(label) if line["kind"] == "learned" else label, *cells])
    return markdown(result_headers(metrics), rows)


def result_headers(metrics: TaskMetrics) -> list[str]:
    """Of the columns that :func:`result_cells` fills."""
    columns = (metrics.headline.header, "Δ to dense", *(metric.header for metric in metrics.columns[1:]))
    return ["Method", "Pattern", "Weight update", "Mask prior", *columns, "Cost (s)"]


def result_cells(line: Mapping[Hashable, Any], metrics: TaskMetrics) -> list[str]:
    """One line of the aggregated table as texts: four that say what the row is, then numbers."""
    headline, others = metrics.headline, metrics.columns[1:]
    return [
        str(line["label"]),
        str(line["pattern"]),
        "✔" if line["update"] else MISSING,
        MISSING if pd.isna(line["prior"]) else str(line["prior"]),
        number(line[f"{headline.name}_mean"], line[f"{headline.name}_std"], headline.digits),
        number(line["delta_mean"], line["delta_std"], headline.digits, sign=True),
        *(number(line[f"{m.name}_mean"], line[f"{m.name}_std"], m.digits) for m in others),
        significant(line["cost_seconds"]),
    ]


def lead(experiment: Experiment, metrics: TaskMetrics) -> str:
    """What the numbers are, in short: of what, over which seeds, compared with what."""
    seeds = len(experiment.seeds)
    spread = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    one_dense = len(experiment.row(experiment.dense.row).seeds) < seeds
    to_dense = "to the one dense model that all seeds share" if one_dense else "to the dense model of the same seed"
    return f"{experiment.title}. {spread}; Δ is the paired difference of {metrics.headline.in_sentences} {to_dense}"


def caption(
    experiment: Experiment,
    metrics: TaskMetrics,
    records: dict[str, dict[str, Any]],
    cost: str = "",
    reproduced: str = "",
    marks: Marks = MARKDOWN,
) -> str:
    """What the numbers are: seeds, hardware, versions, settings that apply to all rows.

    Args:
        experiment: whose table it is.
        metrics: of its task.
        records: its current ones, by row.
        cost: what costs are, as a sentence, with marks.
        reproduced: where an exact table came out the same, as receipts say; empty if nowhere.
        marks: how it is written.
    """
    if not records:
        return f"{NOT_MEASURED}\n"
    first = next(iter(records.values()))
    hardware = sorted({record[what]["hardware"] for record in records.values() for what in ("made", "evaluated")})
    versions = ", ".join(f"{name} {release}" for name, release in first["versions"].items())
    claims = [marks.text(f"Hardware: {'; '.join(hardware)}"), marks.text(reproduced)]
    if not experiment.exact:
        claims[-1] = "a recording of that machine"
    said = [*metrics.captions, *_facts(metrics, records.get(experiment.dense.row))]
    leaks = f"{marks.strong(LEAKS)} (as the original does). " if experiment.data.calibration_split == "test" else ""
    about = marks.text("; ".join([lead(experiment, metrics), *said]))
    where = f"{': '.join(filter(None, claims))}. {marks.text(versions)}."
    return marks.whole(f"{about}. {leaks}{where}{f' {cost}' if cost else ''}") + "\n"


def _facts(metrics: TaskMetrics, dense: Mapping[str, Any] | None) -> list[str]:
    """What the dense row measures beside its columns, in words."""
    first: Mapping[str, float] = next(iter(dense["metrics"].values()), {}) if dense else {}
    return [text.format(first[name]) for name, text in metrics.facts if name in first]


def results_csv(table: pd.DataFrame, metrics: TaskMetrics) -> str:
    """The table with more decimals, for machines."""
    text: str = table.to_csv(index=False, float_format=f"%.{metrics.decimals}f", lineterminator="\n")
    return text


def metrics_json(table: pd.DataFrame, metrics: TaskMetrics) -> dict[str, dict[str, float]]:
    """``{headline: {row: mean}}`` of the measured rows under short names: a column each in ``dvc exp show``."""
    name = metrics.headline.name
    means = table.set_index("row")[f"{name}_mean"].rename(short_names(table["row"])).dropna()
    return {name: {str(row): round(float(value), metrics.decimals) for row, value in means.items()}}
