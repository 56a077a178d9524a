"""Elements of SVG as escaped markup, with rounded coordinates: the same drawing always gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

Point = tuple[float, float]


def tag(name: str, *children: Any, **of: Any) -> Markup:
    """An element; text among its children is escaped."""
    inside, written = Markup("").join(children), attributes(of)
    return Markup(f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>")


def attributes(values: Mapping[str, Any]) -> Markup:
    """Attributes in the order given, each after a space; those that are None are left out, and floats are coordinates.

    ``_`` in their names becomes ``-``; a last one is dropped, for ``class_``.
    """
    written = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(at(value) if isinstance(value, float) else value)}"'
        for key, value in values.items()
        if value is not None
    )
    return Markup("".join(written))  # pages have 70,000 elements, and Markup's own format takes four times as long


def marked(row: str, metric: str, seed: int | None = None) -> dict[str, Any]:
    """Attributes of whatever shows a number: whose it is, which, and of which seed if of one."""
    return {"data_row": row, "data_metric": metric, "data_seed": seed}


def at(coordinate: float) -> str:
    """A coordinate in pixels, to a tenth."""
    text = f"{coordinate:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def polyline(points: Iterable[Point]) -> str:
    """The ``d`` of a path through points."""
    return "M" + "L".join(f"{at(x)} {at(y)}" for x, y in points)


@dataclass(frozen=True)
class Drawing:
    """A chart: on a page it scales with what is around it, in a figure it has a place.

    ``title`` and ``about`` are what screen readers say, ``name`` its classes, sizes are pixels.
    """

    title: str
    about: str
    width: float
    height: float
    content: Markup
    name: str

    def __html__(self) -> Markup:
        """As part of a page; what templates show, and other elements that it is put into."""
        return self._element(viewBox=self._box, role="img", style=f"--w:{at(self.width)}px")

    def placed(self, x: float, y: float) -> Markup:
        """As part of another picture, with its upper left corner at a place there."""
        return self._element(x=x, y=y, width=self.width, height=self.height, viewBox=self._box, role="img")

    @property
    def _box(self) -> str:
        return f"0 0 {at(self.width)} {at(self.height)}"

    def _element(self, **of: Any) -> Markup:
        said = [tag("title", self.title), tag("desc", self.about)]
        return tag("svg", Markup("\n").join([*said, self.content]), class_=f"chart {self.name}".strip(), **of)


def drawing(title: str, about: str, width: float, height: float, *children: Any, name: str = "") -> Drawing:
    """A chart of its elements, a line each."""
    return Drawing(title, about, width, height, Markup("\n").join(children), name)
