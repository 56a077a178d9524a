"""What a task measures and how tables show it; each task's stand in its ``settings.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A number of a record.

    Attributes:
        name: its key in records, and its column's in ``table.csv``.
        header: of its column in a table.
        digits: decimals that a table shows.
        about: what captions say on it, if its header does not say all.
        noun: what sentences call it; by default the header.
        axis: what axes call it; by default the header.
        percent: whether it ends at 100.
        better: which way it gets better.
    """

    name: str
    header: str
    digits: int
    about: str = ""
    noun: str = ""
    axis: str = ""
    percent: bool = False
    better: Literal["higher", "lower"] = "higher"

    @property
    def in_sentences(self) -> str:
        return self.noun or self.header

    @property
    def on_axes(self) -> str:
        return self.axis or self.header


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of a task.

    Attributes:
        columns: those that a table has a column for, in its order; the first one is the :attr:`headline`.
        figure: name of the figure with bars.
        bars: names of the metrics in that figure, a panel each.
        decimals: of ``table.csv`` and ``metrics.json``.
        facts: what captions say on metrics of the dense row that are no columns, by name: a format of the value.
        by_class: what records call the headline of one class, before its name: ``"iou/"``; empty where they do not.
        parts: the headline of a part of the images only, to see what pruning breaks first.
    """

    columns: tuple[Metric, ...]
    figure: str
    bars: tuple[str, ...]
    decimals: int = 4
    facts: tuple[tuple[str, str], ...] = ()
    by_class: str = ""
    parts: tuple[Metric, ...] = ()

    @property
    def headline(self) -> Metric:
        """What rows are compared by: to the dense model, and in figures."""
        return self.columns[0]

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which way the headline gets better; its axis says so where that is downwards."""
        return self.headline.better

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.columns)

    def __getitem__(self, name: str) -> Metric:
        return next(metric for metric in self.columns if metric.name == name)

    @property
    def captions(self) -> list[str]:
        """What captions say on the columns."""
        return [metric.about for metric in self.columns if metric.about]


def rarest(counts: Mapping[str, int]) -> list[str]:
    """The third of the classes, rounded up, of which there are fewest but some; of equal ones, the first."""
    there = sorted((count, place) for place, count in enumerate(counts.values()) if count)
    names = list(counts)
    return [names[place] for _, place in there[: math.ceil(len(there) / 3)]]
