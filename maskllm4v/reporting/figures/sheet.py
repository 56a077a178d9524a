"""Charts of pages beside and below each other in one SVG file, which needs nothing but itself."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from maskllm4v.reporting.page import TEMPLATES
from maskllm4v.reporting.page.svg import Drawing, at, tag

WIDE = 830.0  # pixels that a README gives a picture; a wider one is shrunk, letters and all
COLUMNS = 2  # of the legend
PAD, GAP = 18.0, 28.0  # pixels around all, and between charts
LINE = 17.0  # from one line of text to the next
LETTER = 6.3  # pixels of a letter of the widest usual font, on average: which one it is, is the reader's
MARK, INDENT = 18.0, 48.0  # a mark's width; where texts begin, behind marks and numbers


@dataclass(frozen=True)
class Entry:
    """A line of the legend: what a mark stands for, drawn from 0 to the right and 4 pixels above the text's line.

    ``kind`` is the row's or rows', and ``number`` the row's on the table's page.
    """

    mark: Markup
    text: str
    kind: str
    number: str = ""


def sheet(title: str, note: str, charts: Sequence[Drawing], legend: Sequence[Entry]) -> str:
    """The text of an SVG file; colours follow the reader's scheme, paper included.

    Args:
        title: what it shows, for screen readers.
        note: how to read the charts; stands at the bottom.
        charts: at least one; from left to right as many as a README has room for, then down.
        legend: shared by all charts.
    """
    cell = max(chart.width for chart in charts)
    columns = max(1, min(len(charts), int((WIDE - 2 * PAD + GAP) // (cell + GAP))))
    width = columns * (cell + GAP) - GAP
    marks, y = [], PAD
    for first in range(0, len(charts), columns):
        line = charts[first : first + columns]
        marks += [chart.placed(PAD + place * (cell + GAP), y) for place, chart in enumerate(line)]
        y += max(chart.height for chart in line) + GAP / 2
    half = -(-len(legend) // COLUMNS)
    ends = [y]
    for place, entries in enumerate([legend[:half], legend[half:]]):
        found, end = _column(entries, PAD + place * (width + GAP) / COLUMNS, y, (width - GAP) / COLUMNS)
        marks += found
        ends.append(end)
    y = max(ends) + LINE / 2
    for text in textwrap.wrap(note, int(width / LETTER)):
        marks.append(tag("text", text, x=PAD, y=y + LINE / 2, class_="axis"))
        y += LINE
    size = {"width": width + 2 * PAD, "height": y + PAD / 2}
    return _file(title, note, marks, **size)


def _column(entries: Sequence[Entry], x: float, y: float, width: float) -> tuple[list[Markup], float]:
    """Entries below each other from ``y`` on, and where they end."""
    marks = []
    for entry in entries:
        indent = INDENT if entry.number else MARK + 6
        lines = textwrap.wrap(entry.text, int((width - indent) / LETTER))
        texts = [tag("text", line, x=indent, y=LINE * place) for place, line in enumerate(lines)]
        number = tag("text", entry.number, x=MARK + 6, y=0, class_="number") if entry.number else ""
        place = f"translate({at(x)} {at(y + LINE / 2)})"
        marks.append(tag("g", entry.mark, number, *texts, class_=f"k-{entry.kind}", transform=place))
        y += LINE * len(lines)
    return marks, y


def _file(title: str, note: str, marks: Sequence[Markup], width: float, height: float) -> str:
    style = (TEMPLATES / "charts.css").read_text(encoding="utf-8")
    parts = [
        tag("title", title),
        tag("desc", note),
        tag("style", Markup("\n" + style)),
        tag("rect", width=width, height=height, rx=8, class_="paper"),
        *marks,
    ]
    size = {"width": width, "height": height, "viewBox": f"0 0 {at(width)} {at(height)}"}
    namespace = {"xmlns": "http://www.w3.org/2000/svg"}
    return tag("svg", Markup("\n").join(parts), **namespace, **size, role="img", class_="chart") + "\n"
