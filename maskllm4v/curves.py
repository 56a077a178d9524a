"""Training curves as CSV: one line a point, six significant digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskllm4v.files import write_csv


def write_curve(path: Path, columns: Sequence[str], points: Sequence[Sequence[float]]) -> None:
    """Write a curve; the first column is the step."""
    write_csv(path, columns, ((int(point[0]), *(f"{value:.6g}" for value in point[1:])) for point in points))
