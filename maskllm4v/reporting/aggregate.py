"""Records to one table: mean and spread over seeds, paired differences to the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from maskllm4v.config import Experiment, Row
from maskllm4v.reporting.metrics import by_timestep, metrics_of
from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import read_records, settings_digest
from maskllm4v.utils.errors import UserError


def current_records(experiment: Experiment, reports: Path) -> dict[str, dict[str, Any]]:
    """The records that belong to an experiment's present settings, by row, in the table's order.

    A record of other settings is stale: its row counts as not measured.

    Raises:
        UserError: a record is damaged, or lacks the metric that rows are compared by.
    """
    found, headline = read_records(reports, experiment.table), metrics_of(experiment.task.name).headline.name
    current = {
        row: found[row]
        for row in experiment.rows
        if row in found and found[row]["settings_digest"] == settings_digest(experiment, row)
    }
    for row, record in current.items():
        if not all(headline in values for values in record["metrics"].values()) or not record["metrics"]:
            raise UserError(
                f"{record_file(experiment.table, row, reports)} is damaged: it lacks the metric {headline!r}"
            )
    return current


def seed_metrics(record: Mapping[str, Any]) -> pd.DataFrame:
    """Metrics of one record, a line a seed."""
    frame = pd.DataFrame.from_dict(record["metrics"], orient="index")
    return frame.set_index(frame.index.astype(int)).sort_index()


def timestep_metrics(record: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Mean over seeds of the metrics that a record holds by timestep: by name, then by timestep, in order."""
    found: dict[str, dict[int, float]] = {}
    means = {str(key): float(value) for key, value in seed_metrics(record).mean().items()}
    for name, timestep, value in sorted(by_timestep(means)):
        found.setdefault(name, {})[timestep] = value
    return found


def aggregate(
    experiment: Experiment, records: Mapping[str, Mapping[str, Any]], costs: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """One line a row of the table, measured or not.

    Columns: ``row, label, pattern, update, prior, seeds``, then ``<metric>_mean`` and ``<metric>_std``
    (sample standard deviation, ddof = 1), and ``delta_mean``, ``delta_std``: the paired difference of
    the task's headline to the dense model of the same seed, and ``cost_seconds``, from ``costs`` by row.
    What was not measured is missing.
    """
    task = metrics_of(experiment.task.name)
    headline = task.headline.name
    dense = records.get(experiment.dense.row)
    lines = []
    for row in experiment.rows:
        line: dict[str, Any] = _describe(experiment.row(row))
        line["cost_seconds"] = (costs or {}).get(row, float("nan"))
        if row in records:
            measured = seed_metrics(records[row])
            line["seeds"] = len(measured)
            for name in task.names:
                if name in measured:
                    line |= {f"{name}_mean": measured[name].mean(), f"{name}_std": measured[name].std()}
            if dense is not None and row != experiment.dense.row:
                of_dense = seed_metrics(dense)[headline]
                paired = of_dense[[experiment.dense_seed(seed) for seed in measured.index]].to_numpy()
                difference = measured[headline] - paired
                line |= {"delta_mean": difference.mean(), "delta_std": difference.std()}
        lines.append(line)
    columns = ["row", "label", "kind", "pattern", "update", "prior", "seeds"]
    columns += [f"{name}_{what}" for name in (*task.names, "delta") for what in ("mean", "std")]
    columns.append("cost_seconds")
    return pd.DataFrame(lines, columns=columns)


def best_row(experiment: Experiment, table: pd.DataFrame) -> str | None:
    """The sparse row whose headline has the best mean; of equals, the one further up.

    Args:
        experiment: whose task says which way is better.
        table: from :func:`aggregate`.

    Returns:
        Its key, or None where no row with a pattern was measured.
    """
    task = metrics_of(experiment.task.name)
    means = table[table["pattern"] != "dense"].set_index("row")[f"{task.headline.name}_mean"].dropna()
    means = means.round(task.decimals)  # equal ones are equal, whatever the order of their seeds
    if means.empty:
        return None
    return str(means.idxmax() if task.better == "higher" else means.idxmin())  # the first of equals


def _describe(row: Row) -> dict[str, Any]:
    prior = None if row.source is None else row.source.label
    found = {"kind": row.category, "pattern": row.pattern or "dense", "update": row.updates_weights, "prior": prior}
    return {"row": row.key, "label": row.label, **found}
