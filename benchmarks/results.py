"""One benchmark's numbers: printed as text tables, written as JSON that reports are rendered from.

No dates, so that the same numbers give the same bytes. Numbers measured on a GPU go to a file of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from maskllm4v.runs.paths import REPORTS
from maskllm4v.runs.records import versions
from maskllm4v.utils.devices import hardware, pick_device
from maskllm4v.utils.io import write_json

FOLDER = REPORTS / "benchmarks"
DIGITS = 4  # significant ones that are written
Row = dict[str, str | float | int]


def save(
    name: str,
    sections: dict[str, list[Row]],
    notes: list[str],
    out: Path | None = None,
    *,
    device: torch.device | None = None,
) -> Path:
    """Print every section and write them all.

    Args:
        name: of the benchmark.
        sections: rows by section title; rows of one section may have different columns. A row that was timed
            says by how many repetitions in ``n``.
        notes: what one has to know to read the numbers; printed below the tables.
        out: the file; by default ``reports/benchmarks/<name>.json``, or ``<name>_cuda.json``.
        device: where it ran; by default as :func:`maskllm4v.utils.devices.pick_device` chooses by itself.

    Returns:
        The file written.
    """
    device = device or pick_device("auto")
    path = out or FOLDER / f"{name}{'_cuda' if device.type == 'cuda' else ''}.json"
    rounded = {title: [rounded_row(row) for row in rows] for title, rows in sections.items()}
    machine = {"hardware": hardware(device), "threads": torch.get_num_threads(), "versions": versions()}
    print(f"{name}: {machine['hardware']}, {machine['threads']} threads")
    for title, rows in rounded.items():
        print(f"\n{title}\n{text_table(rows)}")
    print("".join(f"\n{note}" for note in notes))
    write_json(path, {"name": name, "notes": notes, "sections": rounded, **machine})
    print(f"\n{path}")
    return path


def rounded_row(row: Row) -> Row:
    """The row with its fractional numbers rounded to :data:`DIGITS` significant digits."""
    return {key: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for key, v in row.items()}


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns, a line a row; text to the left, numbers to the right, nothing where a row has no value."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(not isinstance(row.get(column, 0), str) for row in rows) for column in columns]
    lines = []
    for line in [columns, *cells]:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: str | float | int) -> str:
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}" if abs(value) < 10**DIGITS else f"{value:.0f}"
    return str(value)
