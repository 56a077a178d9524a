"""Pages as lists of elements, so that tests can say which of them show a number and which ones changed."""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img"}  # HTML elements that have no end


@dataclass
class Element:
    """``text`` is what stands in it directly; ``parent`` is its place in the list.

    ``marks`` say what number it shows: its attributes ``data-…``, or those of what is around it.
    """

    tag: str
    attributes: dict[str, str]
    parent: int | None
    marks: dict[str, str]
    text: str = ""

    @property
    def shows(self) -> tuple[str, str, str | None]:
        """Row, metric and seed of the number; empty texts if none."""
        return self.marks.get("data-row", ""), self.marks.get("data-metric", ""), self.marks.get("data-seed")


class Page(HTMLParser):
    """Parses strictly: every element is closed by its own end."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[int] = []
        self._texts: list[tuple[int, str]] = []  # element and what stands directly in it, in order
        self.feed(text)
        self.close()
        assert not self._open, "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        found = {name: value or "" for name, value in attrs}
        parent = self._open[-1] if self._open else None
        marks = {name: value for name, value in found.items() if name.startswith("data-")}
        if "data-metric" not in found and parent is not None:
            marks = self.elements[parent].marks
        self.elements.append(Element(tag, found, parent, marks))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> ends nothing"
        assert self.elements[self._open.pop()].tag == tag, f"</{tag}> ends another element"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.elements[self._open[-1]].text += data
            self._texts.append((self._open[-1], data))

    def inside(self, place: int) -> list[Element]:
        """All elements within one, in order."""
        return self.elements[place + 1 : self._end(place)]

    def _end(self, place: int) -> int:
        """The place after all that is within an element."""
        end = place + 1
        while end < len(self.elements) and self.within(end, place):
            end += 1
        return end

    def within(self, place: int, outer: int) -> bool:
        """Whether an element stands in another one, however deep."""
        parent = self.elements[place].parent
        return parent is not None and (parent == outer or self.within(parent, outer))

    def text(self, place: int) -> str:
        """All text within an element, in order."""
        end = self._end(place)
        return "".join(text for number, text in self._texts if place <= number < end)

    def find(self, tag: str, **attributes: str) -> list[int]:
        """Places of elements; ``class_`` asks for one class among others."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [place for place, element in enumerate(self.elements) if element.tag == tag and _fits(element, wanted)]


def _fits(element: Element, wanted: dict[str, str]) -> bool:
    return all(
        value in element.attributes.get(name, "").split() if name == "class" else element.attributes.get(name) == value
        for name, value in wanted.items()
    )


def changes(before: Page, after: Page) -> list[Element]:
    """Elements of the first page whose attributes or direct text differ in the second, which has to have as many."""
    old, new = before.elements, after.elements
    assert [element.tag for element in old] == [element.tag for element in new]
    return [a for a, b in zip(old, new, strict=True) if (a.attributes, a.text) != (b.attributes, b.text)]
