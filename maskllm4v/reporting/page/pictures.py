"""Pictures of rows' models at work."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from maskllm4v.reporting.page.results import Results
from maskllm4v.runs.paths import picture_file


@dataclass(frozen=True)
class Kind:
    """Pictures of one name: how they are read, and whether they need more room than others."""

    name: str
    about: str
    wide: bool = False


KINDS = (
    Kind("samples", "Of the first seed, from the same noise in every row."),
    Kind(
        "predictions",
        "Of the first seed, the same images in every row. In each picture from above: the images, the truth, and "
        "what the row's model finds.",
        wide=True,
    ),
)


@dataclass(frozen=True)
class Pictures:
    """``addresses`` hold the PNG files, by row; rows without one are absent."""

    name: str
    about: str
    wide: bool
    addresses: dict[str, str]


def kind_of(results: Results) -> Kind | None:
    """Of what rows have pictures; None where no row has any."""
    return next((kind for kind in KINDS if picture_paths(results, kind)), None)


def picture_paths(results: Results, kind: Kind) -> dict[str, Path]:
    """The PNG files of rows' pictures."""
    table = results.experiment.table
    paths = {row: picture_file(table, row, kind.name, results.reports) for row in results.records}
    return {row: path for row, path in paths.items() if path.exists()}


def read_pictures(results: Results) -> Pictures | None:
    """None where no row has any."""
    kind = kind_of(results)
    if kind is None:
        return None
    found = {row: b64encode(path.read_bytes()).decode() for row, path in picture_paths(results, kind).items()}
    addresses = {row: f"data:image/png;base64,{png}" for row, png in found.items()}
    return Pictures(kind.name, kind.about, kind.wide, addresses)
