"""A corner of one weight with its mask before and after learning, cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import linear_scale
from maskllm4v.reporting.page.svg import Drawing, drawing, tag
from maskllm4v.reporting.tables import LEARNED
from maskllm4v.runs.paths import tile_file
from maskllm4v.utils.io import read_json

CELL, GAP = 13.0, 5.0  # pixels of a weight, and between groups
PRUNED = 4.0  # what is left of the picture of a pruned weight


@dataclass(frozen=True)
class Tile:
    """A row's picture, and what is said about it."""

    row: str
    picture: Markup
    about: str


def read_tiles(results: Results) -> list[Tile]:
    """Tiles of the rows whose masks were learned, from the best row on; of equals, the one further up."""
    name = results.metrics.headline.name
    sign = -1 if results.metrics.better == "higher" else 1
    learned = [row for row in results.measured if results.kind(row) in LEARNED]
    rows = sorted(learned, key=lambda row: sign * float(results.lines[row][f"{name}_mean"]))
    paths = {row: tile_file(results.experiment.table, row, results.reports) for row in rows}
    return [_tile(row, results.labels[row], read_json(path)) for row, path in paths.items() if path.exists()]


def _tile(row: str, label: str, found: dict[str, Any]) -> Tile:
    m = int(str(found["pattern"]).partition(":")[2])
    changed = _changed(found["before"], found["after"], m)
    groups = sum(len(bits) // m for bits in found["after"])
    about = (
        f"{found['layer']}, seed {found['seed']}, first {len(found['weights'])} rows and "
        f"{len(found['weights'][0])} columns: {len(changed)} of {groups} groups changed."
    )
    return Tile(row, _picture(label, found, m, changed), about)


def _changed(before: list[str], after: list[str], m: int) -> set[tuple[int, int]]:
    """Groups, as line and first column, whose mask is another one."""
    return {
        (line, start)
        for line, (old, new) in enumerate(zip(before, after, strict=True))
        for start in range(0, len(new), m)
        if old[start : start + m] != new[start : start + m]
    }


def _picture(label: str, found: dict[str, Any], m: int, changed: set[tuple[int, int]]) -> Markup:
    """Both masks side by side, or below each other where a page is narrow."""
    largest = linear_scale([0.0, *(abs(weight) for line in found["weights"] for weight in line)], count=4).ticks[-1]
    groups = [(_place(start, m) - 1, line * CELL) for line, start in sorted(changed)]
    frames = "".join(f"M{x:.0f} {y:.0f}h{m * CELL + 1:.0f}v{CELL:.0f}h-{m * CELL + 1:.0f}z" for x, y in groups)
    sides = {"before, the prior's mask": found["before"], "after learning": found["after"]}
    return Markup("").join(
        _side(f"{label}: {side}", found["weights"], mask, m, largest, frames) for side, mask in sides.items()
    )


def _side(title: str, weights: list[list[float]], mask: list[str], m: int, largest: float, frames: str) -> Drawing:
    cells = [
        _cell(weight, bits[column] == "1", _place(column, m), line * CELL, largest)
        for line, (row, bits) in enumerate(zip(weights, mask, strict=True))
        for column, weight in enumerate(row)
    ]
    width, height = _place(len(weights[0]) - 1, m) + CELL, len(weights) * CELL
    return drawing(
        title,
        "Squares are weights, coloured by value; small ones are pruned; groups in frames changed.",
        width + 4,
        height + 22,
        tag("text", title.rpartition(": ")[2], x=2.0, y=12.0, class_="title"),
        tag("g", *cells, tag("path", d=frames, class_="changed") if frames else "", transform="translate(2 21)"),
        name="tile",
    )


def _cell(weight: float, kept: bool, x: float, y: float, largest: float) -> Markup:
    size = CELL - 2 if kept else PRUNED
    margin = (CELL - size) / 2
    shade = round(100 * (abs(weight) / largest) ** 0.5)  # small weights differ, too
    square = f"M{x + margin:g} {y + margin:g}h{size:g}v{size:g}h-{size:g}z"  # shorter than a rect; there are many
    return tag(
        "path",
        tag("title", f"{weight:g}"),
        d=square,
        class_="neg" if weight < 0 else None,
        style=f"--v:{shade}",
    )


def _place(column: int, m: int) -> float:
    return column * CELL + column // m * GAP
