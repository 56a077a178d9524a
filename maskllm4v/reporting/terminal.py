"""A table for the terminal: aligned at decimal points, as many columns as there is room for."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import aggregate, best_row, current_records
from maskllm4v.reporting.benchmarks.costs import row_costs
from maskllm4v.reporting.metrics import METRICS
from maskllm4v.reporting.tables import LABELS, LEAKS, lead, result_cells, result_headers

WIDTH = 120  # where nobody says how wide it is
LABEL = 30  # letters of a label's line, where a table needs the room
GAP = "  "
BOLD = "\033[1m{}\033[0m"


def show(experiment: Experiment, reports: Path) -> None:
    """Print a table, as wide as the terminal; the best sparse row is bold where there is one that shows it."""
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(table_text(experiment, reports, width, bold))


def table_text(experiment: Experiment, reports: Path, width: int = WIDTH, bold: bool = False) -> str:
    """The table of an experiment as lines of at most ``width`` columns, and what it is.

    Long labels take several lines, then metrics are left out from the last one on, and named; only where the first
    metric and its difference do not fit either are lines longer. Numbers are the README's.
    """
    metrics, records = METRICS[experiment.task.name], current_records(experiment, reports)
    table = aggregate(experiment, records, row_costs(experiment.table, reports))
    headers, rows = result_headers(metrics), [result_cells(line, metrics) for line in table.to_dict("records")]
    best = best_row(experiment, table)
    mark = list(table["row"]).index(best) if bold and best is not None else None
    extra = range(LABELS + 2, len(headers) - 1)  # metrics after the headline and its difference; the cost stays
    layouts = [(None, len(extra)), *((LABEL, shown) for shown in range(len(extra), -1, -1))]
    for letters, shown in layouts:
        left_out = list(extra[shown:])
        kept = [column for column in range(len(headers)) if column not in left_out]
        lines = _lines([[row[column] for column in kept] for row in [headers, *rows]], letters, mark)
        if max(map(_width, lines)) <= width:
            break
    said = [lead(experiment, metrics)] if records else ["Not measured yet"]
    if experiment.data.calibration_split == "test":
        said.append(LEAKS)
    if left_out:
        names = ", ".join(headers[column] for column in left_out)
        said.append(f"No room for {names}: see {reports.name}/{experiment.table}/table.md")
    return "\n".join([*lines, "", *textwrap.wrap(f"{'. '.join(said)}.", width)])


def _lines(rows: Sequence[Sequence[str]], letters: int | None, mark: int | None) -> list[str]:
    """Header, rule and rows; labels are wrapped after so many letters; of row ``mark`` label and headline are bold."""
    columns = list(zip(*rows, strict=True))
    labels = [[_wrapped(cell, letters) for cell in column[1:]] for column in columns[:LABELS]]
    numbers = [[[cell] for cell in _aligned(column[1:])] for column in columns[LABELS:]]
    blocks = [[[*column[0].split(" ", 1)], *block] for column, block in zip(columns, [*labels, *numbers], strict=True)]
    widths = [max(_width(line) for cell in block for line in cell) for block in blocks]
    lines = []
    for number in range(len(rows)):  # the first one is the header
        of_row = [block[number] for block in blocks]
        for part in range(max(map(len, of_row))):
            texts = [cell[part] if part < len(cell) else "" for cell in of_row]
            padded = [
                _pad(text, width, left=i < LABELS) for i, (text, width) in enumerate(zip(texts, widths, strict=True))
            ]
            if mark is not None and number == mark + 1:
                padded = [BOLD.format(text) if i in (0, LABELS) else text for i, text in enumerate(padded)]
            lines.append(GAP.join(padded).rstrip())
        if number == 0:
            lines.append(GAP.join("─" * width for width in widths))
    return lines


def _wrapped(cell: str, letters: int | None) -> list[str]:
    return (
        textwrap.wrap(cell, letters, subsequent_indent=" ", break_long_words=False, break_on_hyphens=False)
        if letters
        else [cell]
    )


def _aligned(column: Sequence[str]) -> list[str]:
    """Numbers of a column with their decimal points below each other, and those of their spreads likewise."""
    means, signs, spreads = zip(*(cell.partition(" ± ") for cell in column), strict=True)
    between = max(map(len, signs))
    parts = zip(_at_points(means), signs, _at_points(spreads), strict=True)
    return [f"{mean}{sign:{between}}{spread}" if between else mean for mean, sign, spread in parts]


def _at_points(numbers: Sequence[str]) -> list[str]:
    parts = [number.partition(".") for number in numbers]
    before, after = (max(len(whole) for whole, _, _ in parts), max(len(point + rest) for _, point, rest in parts))
    return [whole.rjust(before) + (point + rest).ljust(after) for whole, point, rest in parts]


def _pad(text: str, width: int, left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text


def _width(text: str) -> int:
    """Columns that a terminal gives a text: two for wide letters, none for accents and escapes."""
    plain = text.replace("\033[1m", "").replace("\033[0m", "")
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in plain)
    return len(plain) + wide - sum(map(bool, map(unicodedata.combining, plain)))
