"""Reading the numbers that benchmarks left in ``reports/benchmarks/*.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from maskllm4v.reporting.benchmarks.costs import machine
from maskllm4v.reporting.marks import escaped

Row = Mapping[str, Any]


def caption(found: Row) -> str:
    """Hardware, releases, and how often each candidate ran."""
    counts = sorted({row["n"] for rows in found["sections"].values() for row in rows if "n" in row})
    repetitions = f"median of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} runs, " if counts else ""
    torch = found["versions"]["torch"]
    return f"*{escaped(machine(dict(found)))}; torch {escaped(torch)}; {repetitions}all candidates in turn.*\n"


def rows_of(found: Row, name: str) -> list[Row]:
    return list(found["sections"].get(name, []))


def find(rows: Iterable[Row], where: Mapping[str, Any]) -> Row | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in where.items())), None)


def distinct(rows: Iterable[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def distinct_rows(rows: Iterable[Row], column: str) -> list[Row]:
    """The first row of each value."""
    return list({row[column]: row for row in reversed(list(rows))}.values())[::-1]
