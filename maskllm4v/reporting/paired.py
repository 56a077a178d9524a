"""Differences to one row of a table, paired by seed, as ``docs/findings.md`` shows them between markers of its own.

``<!-- cifar10: cifar10-maskllm-long-magnitude -->`` names the table and the row that others are compared with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import aggregate, current_records, seed_metrics
from maskllm4v.reporting.benchmarks.costs import row_costs, trained_length, whole_costs
from maskllm4v.reporting.marks import link, markdown, strong
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.tables import MISSING, NOT_MEASURED, number, result_cells, significant
from maskllm4v.runs.paths import evaluation_folder
from maskllm4v.utils.errors import UserError

MARKER = re.compile(r"<!-- ([\w-]+): ([\w-]+) -->")


def paired_sections(text: str, experiments: Mapping[str, Experiment], reports: Path, folder: Path) -> dict[str, str]:
    """The generated sections of a document by marker name.

    Args:
        text: of the document.
        experiments: by table.
        reports: the folder of reports.
        folder: in which the document lies, for its links.

    Raises:
        UserError: a marker names no table, or a row that its table has not.
    """
    found = {}
    for table, row in MARKER.findall(text):
        if table not in experiments or row not in experiments[table].rows:
            raise UserError(f"<!-- {table}: {row} -->: there is no such row in experiments/")
        found[f"{table}: {row}"] = paired_markdown(experiments[table], row, reports, folder)
    return found


def paired_markdown(experiment: Experiment, reference: str, reports: Path, folder: Path) -> str:
    """A line for each measured row of the reference's pattern, with a link to its record.

    Args:
        experiment: of the table.
        reference: the row that others are compared with.
        reports: the folder of reports.
        folder: in which the document lies.
    """
    headline, records = metrics_of(experiment.task.name).headline, current_records(experiment, reports)
    costs = row_costs(experiment.table, reports)
    whole = whole_costs(experiment, costs)
    table = aggregate(experiment, records, costs).set_index("row", drop=False)
    rows = [row for row in records if experiment.row(row).pattern == experiment.row(reference).pattern]
    if reference not in rows:
        return f"{NOT_MEASURED}\n"
    of_reference = seed_metrics(records[reference])[headline.name]
    lines = []
    for row in rows:
        line = table.loc[row].to_dict()
        label, _, update, prior, value, to_dense, *_ = result_cells(line, metrics_of(experiment.task.name))
        difference = seed_metrics(records[row])[headline.name] - of_reference
        to_reference = number(difference.mean(), difference.std(), headline.digits, sign=True)
        name = strong(label) if line["kind"] == "learned" else label
        record = os.path.relpath(evaluation_folder(experiment.table, row, reports) / "record.json", folder)
        to_reference = "0" if row == reference else to_reference
        cost = significant(whole.get(row))
        cells = [update, prior, value, to_dense, to_reference, _length(experiment, row), cost]
        lines.append([link(name, Path(record).as_posix()), *cells])
    ahead, delta = ["Method", "Weight update", "From", headline.header], f"Δ to {experiment.row(reference).label}"
    return markdown([*ahead, "Δ to dense", delta, "Trained", "Cost (s)"], lines)


def _length(experiment: Experiment, row: str) -> str:
    """How long was trained from the dense model to a row; ``–`` if nothing was."""
    steps, epochs = (trained_length(experiment, row, unit) for unit in ("steps", "epochs"))
    found = [f"{steps:,.0f} steps"] * (steps > 0) + [f"{epochs:g} epochs"] * (epochs > 0)
    return " + ".join(found) or MISSING
