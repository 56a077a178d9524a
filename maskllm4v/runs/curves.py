"""Training curves as CSV: one line a point, six significant digits; finished ones, and ones that still grow."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import write_csv


def write_curve(path: Path, columns: Sequence[str], points: Sequence[Sequence[float]]) -> None:
    """Write a curve; the first column is the step."""
    write_csv(path, columns, map(_cells, points))


def read_curve(path: Path) -> list[dict[str, float]]:
    """The points of a curve by column, the step among them.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else than numbers.
    """
    curve = FollowedCurve(path)
    curve.update()
    return curve.points


class GrowingCurve:
    """A curve's file that gets its points while they are taken, for those who watch.

    It is no result: where it cannot be written, the training goes on without.

    Args:
        path: of the file; what lies there is replaced.
        columns: of the points.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, columns
        self._begun = self._failed = False

    def __call__(self, points: Sequence[Sequence[float]]) -> None:
        """Add points; the first ones replace the file."""
        if self._failed:
            return
        try:
            if self._begun:
                with self._path.open("a", encoding="utf-8", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(map(_cells, points))
            else:
                write_curve(self._path, self._columns, points)
        except (OSError, UserError):
            self._failed = True
        self._begun = True


class FollowedCurve:
    """A growing curve as its reader has it.

    Attributes:
        points: those read so far, by column, the step among them.
    """

    def __init__(self, path: Path) -> None:
        self.points: list[dict[str, float]] = []
        self._path, self._columns, self._read = path, list[str](), 0

    def update(self) -> None:
        """Read what was added; a last line that is still being written is left for the next time. Errors as above."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        lines = list(csv.reader(whole.decode().splitlines()))
        if lines and not self._columns:
            self._columns = lines.pop(0)
        self.points += [dict(zip(self._columns, map(float, line), strict=True)) for line in lines]


def _cells(point: Sequence[float]) -> list[int | str]:
    return [int(point[0]), *(f"{value:.6g}" for value in point[1:])]
