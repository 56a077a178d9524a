"""A white card to draw on in pixels, readable on light and dark pages; saved to the same bytes on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

INK, MUTED, LINE, PANEL = "#1f2328", "#59636e", "#d1d9e0", "#f6f8fa"
BLUE, PALE = "#2a6f97", "#dbe9f2"  # learned, and its tint
GREY, MINT = "#9db4c8", "#a9cdbd"  # one-shot and frozen; updated
ORANGE = "#b35900"  # backward
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "mathtext.fontset": "dejavusans",
    "svg.hashsalt": "maskllm4v",
}
SCALE = 100  # pixels an inch


class Card:
    """A drawing of so many pixels; x goes right, y down.

    Args:
        width, height: of the card.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width / SCALE, height / SCALE), facecolor="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.box(1, 1, width - 2, height - 2, fill="white", edge=LINE, radius=10, layer=-2)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str,
        edge: str,
        radius: float = 5,
        line: float = 1.0,
        layer: float = 1,
    ) -> None:
        """A rectangle with round corners."""
        self.axes.add_patch(
            FancyBboxPatch(
                (x + radius, y + radius),
                width - 2 * radius,
                height - 2 * radius,
                boxstyle=f"round,pad={radius},rounding_size={radius}",
                facecolor=fill,
                edgecolor=edge,
                linewidth=line * 0.75,
                zorder=layer,
            )
        )

    def bar(
        self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none", layer: float = 1
    ) -> None:
        """A rectangle."""
        self.axes.add_patch(
            Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=0.75, zorder=layer)
        )

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """A disc."""
        self.axes.add_patch(Circle((x, y), radius, facecolor=fill, edgecolor="none"))

    def text(self, x: float, y: float, text: str, size: float = 12, **style: Any) -> None:
        """Words whose middle is at ``y``; ``size`` in pixels."""
        style = {"color": INK, "va": "center_baseline", **style}
        self.axes.text(x, y, text, fontsize=size * 0.72, **style)

    def path(self, *points: tuple[float, float], colour: str = MUTED, dashed: bool = False, line: float = 1.6) -> None:
        """Straight lines through points, an arrow's head at the last one."""
        xs, ys = zip(*points, strict=True)
        style = (0, (4, 2.5)) if dashed else "-"
        self.axes.plot(xs[:-1], ys[:-1], color=colour, linewidth=line * 0.75, linestyle=style, solid_joinstyle="round")
        self.arrow(points[-2], points[-1], colour=colour, dashed=dashed, line=line)

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        colour: str = MUTED,
        dashed: bool = False,
        line: float = 1.6,
    ) -> None:
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>,head_length=5,head_width=2.6",
                shrinkA=0,
                shrinkB=0,
                color=colour,
                linewidth=line * 0.75,
                linestyle=(0, (4, 2.5)) if dashed else "-",
                joinstyle="miter",
            )
        )

    def cells(
        self,
        x: float,
        y: float,
        fills: Sequence[str],
        size: float,
        texts: Sequence[str] = (),
        colours: Sequence[str] = (),
    ) -> None:
        """A row of squares that touch, with words in them."""
        for number, fill in enumerate(fills):
            self.bar(x + number * size, y, size, size, fill, edge=MUTED)
        for number, text in enumerate(texts):
            colour = colours[number] if colours else INK
            self.text(
                x + (number + 0.5) * size, y + size / 2, text, size=min(12, size * 0.3), ha="center", color=colour
            )

    def save(self, stem: Path) -> list[Path]:
        """As SVG and PNG; returns the files."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        vector, pixels = stem.with_suffix(".svg"), stem.with_suffix(".png")
        with rc_context(STYLE):
            self.figure.savefig(vector, format="svg", metadata={"Date": None}, transparent=True)
            self.figure.savefig(pixels, format="png", dpi=2 * SCALE, transparent=True)
        return [vector, pixels]


def shade(share: float) -> str:
    """White to blue."""
    share = min(max(share, 0.0), 1.0)
    ends = ((255, 255, 255), tuple(int(BLUE[i : i + 2], 16) for i in (1, 3, 5)))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))
