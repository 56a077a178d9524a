"""Elements of SVG as escaped markup, with rounded coordinates: the same drawing always gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def drawing(title: str, about: str, width: float, height: float, *children: Any, name: str = "") -> Markup:
    """A picture of its own that scales, a line a child; ``title`` and ``about`` are what screen readers say."""
    return tag(
        "svg",
        Markup("\n").join([tag("title", title), tag("desc", about), *children]),
        class_=f"chart {name}".strip(),
        viewBox=f"0 0 {at(width)} {at(height)}",
        role="img",
        style=f"--w:{at(width)}px",
    )
