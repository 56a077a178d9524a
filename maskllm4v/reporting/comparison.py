"""Published and reproduced results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskllm4v.reporting.aggregate import seed_metrics
from maskllm4v.reporting.marks import markdown
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.published import ROWS, TABLE, Published
from maskllm4v.reporting.tables import MISSING, number
from maskllm4v.runs.records import read_records

SHOWN = ("top1", "top5")  # of what is reproduced; the original is one of classification


def comparison_markdown(reports: Path) -> str:
    """The original's table with a column for what was reproduced here; ``–`` until someone ran it."""
    reproduced = read_records(reports, TABLE)
    headers = [
        "Method",
        "Pattern",
        "Weight update",
        "Mask prior",
        "Published top-1",
        "Published top-5",
        "Reproduced top-1",
        "Reproduced top-5",
    ]
    return markdown(headers, [_line(row, reproduced.get(row.row)) for row in ROWS])


def _line(row: Published, record: dict[str, Any] | None) -> list[str]:
    found = [MISSING, MISSING]
    if record is not None:
        measured, metrics = seed_metrics(record), metrics_of("classification")
        found = [number(measured[name].mean(), measured[name].std(), metrics[name].digits) for name in SHOWN]
    published_top5 = f"{row.json['top5']:.3f}" if row.json else MISSING
    return [
        row.label,
        row.pattern,
        "✔" if row.update else MISSING,
        row.prior or MISSING,
        row.top1,
        published_top5,
        *found,
    ]
