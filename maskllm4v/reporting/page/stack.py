"""Rows below each other, each under its number and label, as bars and dots stand in charts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.svg import tag

LETTERS = 56  # of a label's line
LINE = 15.0  # pixels from one to the next
INDENT = 23.0  # of labels, for the numbers before them


@dataclass(frozen=True)
class Place:
    """Where a row stands: lines of its label from ``top`` on, and below them what is drawn, ``height`` pixels high."""

    row: str
    label: list[str]
    top: float
    height: float

    @property
    def upper(self) -> float:
        return self.top + LINE * len(self.label)

    @property
    def lower(self) -> float:
        return self.upper + self.height

    @property
    def middle(self) -> float:
        return self.upper + self.height / 2


def stacked(results: Results, rows: Iterable[str], height: float, gap: float) -> list[Place]:
    """Places of rows from the top of a drawing down, with ``gap`` pixels between them."""
    places: list[Place] = []
    for row in rows:
        top = places[-1].lower + gap if places else 4.0
        places.append(Place(row, textwrap.wrap(results.labels[row], LETTERS), top, height))
    return places


def heading(results: Results, place: Place, x: float) -> Markup:
    """A row's number, and its label beside it."""
    first = place.top + 11  # the line that letters stand on
    marks = [tag("text", f"{results.numbers[place.row]}", x=x, y=first, class_="number")]
    for number, part in enumerate(place.label):
        marks.append(tag("text", part, x=x + INDENT, y=first + LINE * number, class_="name"))
    return Markup("").join(marks)
