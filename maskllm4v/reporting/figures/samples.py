"""The figure with pictures: what each row's model samples from the same noise, or finds in the same images."""

from __future__ import annotations

import textwrap
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from maskllm4v.reporting.page.pictures import Kind, picture_paths
from maskllm4v.reporting.page.results import Results
from maskllm4v.utils.images import read_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
IN_LINE, WIDE_IN_LINE = 4, 2  # pictures
SIDE, WIDE_SIDE = 480, 960  # pixels that the longer side of a picture gets, at most
GAP = 18
FONT, LINE = 8, 22  # points; pixels a line of a title, at DPI
LETTER = 11  # pixels of one in a title
STYLE = {"font.family": "DejaVu Sans"}  # comes with matplotlib


def samples_file(results: Results, kind: Kind) -> bytes:
    """The figure as a PNG; see :func:`samples`."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = samples(results, kind)
        file = BytesIO()
        figure.savefig(file, dpi=DPI, format="png")
    return file.getvalue()


def samples(results: Results, kind: Kind) -> Figure:
    """The rows' pictures of a kind, of which there is one at least, under their labels.

    Each picture is enlarged or reduced by a whole number and laid on the figure's own pixels: what is seen is what
    was sampled, no pixel of it smeared or wider than another.
    """
    from matplotlib.figure import Figure

    side, in_line = (WIDE_SIDE, WIDE_IN_LINE) if kind.wide else (SIDE, IN_LINE)
    found = {row: fitted(read_picture(path), side) for row, path in picture_paths(results, kind).items()}
    titles = {row: textwrap.wrap(results.labels[row], side // LETTER) for row in found}
    high, wide = (max(picture.shape[side] for picture in found.values()) for side in (0, 1))
    wide = max(wide, side // 2)  # room for titles
    above = LINE * max(map(len, titles.values())) + GAP // 2
    columns, lines = min(in_line, len(found)), -(-len(found) // in_line)
    width, height = columns * (wide + GAP) + GAP, lines * (above + high + GAP) + GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for number, (row, picture) in enumerate(found.items()):
        left = GAP + number % in_line * (wide + GAP)
        top = height - GAP - number // in_line * (above + high + GAP)
        figure.text(left / width, top / height, "\n".join(titles[row]), va="top", fontsize=FONT, parse_math=False)
        figure.figimage(picture, left, top - above - picture.shape[0], origin="upper")
    return figure


def fitted(picture: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Pixels repeated, or averaged in squares, so many times that the longer side comes close to ``side``."""
    high, wide = picture.shape[:2]
    longer = max(high, wide)
    if longer <= side:
        factor = side // longer
        return picture.repeat(factor, 0).repeat(factor, 1)
    factor = -(-longer // side)
    whole = picture[: high // factor * factor, : wide // factor * factor]
    squares = whole.reshape(high // factor, factor, wide // factor, factor, -1)
    return squares.mean((1, 3)).round().astype(np.uint8)
