"""The rectangle that a chart is drawn in: places of numbers, grid lines and what axes say."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from maskllm4v.reporting.page.scales import Scale
from maskllm4v.reporting.page.svg import tag


@dataclass(frozen=True)
class Frame:
    """Pixels from the drawing's upper left corner, and the scales of both directions."""

    left: float
    top: float
    right: float
    bottom: float
    across: Scale
    up: Scale | None = None

    def x(self, value: float) -> float:
        return self.left + self.across(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        assert self.up is not None  # a chart with lines of its own has none
        return self.bottom - self.up(value) * (self.bottom - self.top)

    def axes(self, below: str = "") -> Markup:
        """Both directions: grid lines, numbers at their ends, and a text below."""
        lines, texts = [], []
        for tick in self.across.ticks:
            x = self.x(tick)
            lines.append(tag("path", d=f"M{x:.1f} {self.top:.1f}V{self.bottom:.1f}"))
            texts.append(tag("text", self.across.label(tick), x=x, y=self.bottom + 16, text_anchor="middle"))
        if below:
            middle = (self.left + self.right) / 2
            texts.append(tag("text", below, x=middle, y=self.bottom + 34, text_anchor="middle"))
        return tag("g", *lines, class_="grid") + tag("g", *texts, class_="ticks") + self.levels()

    def levels(self, unit: str = "") -> Markup:
        """Horizontal lines and the numbers that they stand for."""
        lines, texts = [], []
        for tick, label in [(tick, self.up.label(tick)) for tick in self.up.ticks] if self.up else []:
            y = self.y(tick)
            lines.append(tag("path", d=f"M{self.left:.1f} {y:.1f}H{self.right:.1f}"))
            texts.append(tag("text", label + unit, x=self.left - 6, y=y + 4, text_anchor="end"))
        return tag("g", *lines, class_="grid") + tag("g", *texts, class_="ticks") if lines else Markup("")
