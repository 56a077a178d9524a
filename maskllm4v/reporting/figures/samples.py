"""The figure with pictures: what each row's model samples, from the same noise, side by side."""

from __future__ import annotations

import textwrap
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from maskllm4v.reporting.page.results import Results
from maskllm4v.runs.paths import picture_file
from maskllm4v.utils.images import read_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "samples"  # the picture of a row that the figure shows
DPI = 150
IN_LINE = 4  # pictures
SIDE = 480  # pixels that the longer side of a picture gets, at most
GAP = 18
FONT, LINE = 8, 22  # points; pixels a line of a title, at DPI
LETTERS = SIDE // 11  # of a title's line
STYLE = {"font.family": "DejaVu Sans"}  # comes with matplotlib


def samples_file(results: Results) -> bytes | None:
    """The figure as a PNG; None where no row has a picture."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = samples(results)
        if figure is None:
            return None
        file = BytesIO()
        figure.savefig(file, dpi=DPI, format="png")
    return file.getvalue()


def samples(results: Results) -> Figure | None:
    """The rows' pictures under their labels; None where no row has one.

    Each picture is enlarged or reduced by a whole number and laid on the figure's own pixels: what is seen is what
    was sampled, no pixel of it smeared or wider than another.
    """
    from matplotlib.figure import Figure

    paths = {row: picture_file(results.experiment.table, row, PICTURE, results.reports) for row in results.records}
    found = {row: fitted(read_picture(path)) for row, path in paths.items() if path.exists()}
    if not found:
        return None
    titles = {row: textwrap.wrap(results.labels[row], LETTERS) for row in found}
    high, wide = (max(picture.shape[side] for picture in found.values()) for side in (0, 1))
    wide = max(wide, SIDE // 2)  # room for titles
    above = LINE * max(map(len, titles.values())) + GAP // 2
    columns, lines = min(IN_LINE, len(found)), -(-len(found) // IN_LINE)
    width, height = columns * (wide + GAP) + GAP, lines * (above + high + GAP) + GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for number, (row, picture) in enumerate(found.items()):
        left = GAP + number % IN_LINE * (wide + GAP)
        top = height - GAP - number // IN_LINE * (above + high + GAP)
        figure.text(left / width, top / height, "\n".join(titles[row]), va="top", fontsize=FONT, parse_math=False)
        figure.figimage(picture, left, top - above - picture.shape[0], origin="upper")
    return figure


def fitted(picture: np.ndarray) -> np.ndarray:
    """Pixels repeated, or averaged in squares, so many times that the longer side comes close to :data:`SIDE`."""
    high, wide = picture.shape[:2]
    longer = max(high, wide)
    if longer <= SIDE:
        factor = SIDE // longer
        return picture.repeat(factor, 0).repeat(factor, 1)
    factor = -(-longer // SIDE)
    whole = picture[: high // factor * factor, : wide // factor * factor]
    squares = whole.reshape(high // factor, factor, wide // factor, factor, -1)
    return squares.mean((1, 3)).round().astype(np.uint8)
