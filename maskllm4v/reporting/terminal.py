"""A table for the terminal: numbers below each other, as many columns as there is room for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import aggregate, best_row, current_records
from maskllm4v.reporting.benchmarks.costs import row_costs
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.tables import LABELS, LEAKS, lead, result_cells, result_headers

LABEL, NARROW = 30, 12  # columns that a label keeps, where a table needs the room, and where nothing else gives way
UPDATE = 2  # the column that is left out last, "Weight update"
PROSE = 120  # columns of the text below a table that may be as wide as it likes
ENDLESS = 10_000  # columns, where nothing has to fit


def show(experiment: Experiment, reports: Path) -> None:
    """Print a table; in a terminal as wide as that, with the best sparse row bold unless ``NO_COLOR`` is set.

    In a pipe or a file no column is left out, unless the variable ``COLUMNS`` says how wide it may be.
    """
    terminal = Console()
    bold = terminal.color_system is not None and not terminal.no_color
    print(table_text(experiment, reports, shutil.get_terminal_size((0, 0)).columns or None, bold))


def table_text(experiment: Experiment, reports: Path, width: int | None = None, bold: bool = False) -> str:
    """The table of an experiment as lines of at most ``width`` columns (None: no limit), and what it is.

    Long labels take several lines, then metrics are left out from the last one on, and named, then labels get narrow;
    only where the first metric and its difference do not fit either are lines longer. Numbers are the README's.
    """
    metrics, records = metrics_of(experiment.task.name), current_records(experiment, reports)
    table = aggregate(experiment, records, row_costs(experiment.table, reports))
    headers, rows = result_headers(metrics), [result_cells(line, metrics) for line in table.to_dict("records")]
    best = best_row(experiment, table) if bold else None
    mark = None if best is None else list(table["row"]).index(best)
    drawn, left_out = _fitted(headers, rows, mark, width or ENDLESS)
    said = [lead(experiment, metrics)] if records else ["Not measured yet"]
    if experiment.data.calibration_split == "test":
        said.append(LEAKS)
    if left_out:
        said.append(f"No room for {', '.join(left_out)}: see {reports.name}/{experiment.table}/table.md")
    return f"{drawn}\n\n{_printed(Text('. '.join(said) + '.'), width or PROSE)}"


def _fitted(headers: list[str], rows: list[list[str]], mark: int | None, width: int) -> tuple[str, list[str]]:
    """The table with the most columns that fit, and the headers of those that it lacks; row ``mark`` is bold."""
    extra = list(range(LABELS + 2, len(headers) - 1))  # metrics after the headline and its difference; the cost stays
    layouts = [
        (ENDLESS, []),
        *((LABEL, extra[shown:]) for shown in range(len(extra), -1, -1)),
        (NARROW, extra),
        (NARROW, [UPDATE, *extra]),
    ]
    for label, left_out in layouts:
        table = _table(headers, rows, mark, label, left_out)
        console = _console(ENDLESS)
        least = Measurement.get(console, console.options, table).minimum
        if least <= width:
            break
    return _printed(table, max(width, least)), [headers[column] for column in left_out]


def _table(headers: list[str], rows: list[list[str]], mark: int | None, label: int, left_out: list[int]) -> Table:
    """Labels to the left, wrapped from so many columns on, numbers to the right.

    The first column takes what room there is. Of row ``mark`` label and headline are bold.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    columns = []
    for place, (header, column) in enumerate(zip(headers, zip(*rows, strict=True), strict=True)):
        if place in left_out:
            continue
        name, is_label = header.replace(" ", "\n", 1), place < LABELS
        cells = [Text(cell) for cell in (column if is_label else _aligned(column))]
        wide = max(map(cell_len, [*name.split("\n"), *(cell.plain for cell in cells)]))
        if is_label:
            word = max(map(cell_len, " ".join([header, *column]).split()))
            wide = min(wide, max(label, word))
        for cell in cells:
            if not is_label:
                cell.pad_left(wide - cell.cell_len)
        if mark is not None and place in (0, LABELS):
            cells[mark].stylize("bold")
        table.add_column(
            Text(name, justify="left" if is_label else "right"), min_width=wide, width=wide if place else None
        )
        columns.append(cells)
    for of_row in zip(*columns, strict=True):
        table.add_row(*of_row)
    return table


def _printed(what: Table | Text, width: int) -> str:
    """Lines without spaces at their ends."""
    console = _console(width)
    with console.capture() as captured:
        console.print(what)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _console(width: int) -> Console:
    """Of that size whatever is around; styles are written, since a table has some only where they are wanted."""
    return Console(file=StringIO(), width=width, height=1, color_system="standard", force_terminal=True, no_color=False)


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
