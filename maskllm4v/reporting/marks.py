"""Markdown out of texts that anybody wrote: titles, labels, names of hardware and of models.

What is a :class:`Markdown` already stays as it is; any other text is shown as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maskllm4v.utils.text import plain


class Markdown(str):
    """A text that is Markdown on purpose."""

    __slots__ = ()


def escaped(text: str) -> Markdown:
    """A text as Markdown that shows it, in a cell of a table or elsewhere within a line: on one line, no mark in it.

    ``<`` and ``>`` are entities, so that no text holds one of the markers that blocks of a document stand between.
    """
    if isinstance(text, Markdown):
        return text
    shown = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markdown(_MARKS.sub(r"\\\g<0>", shown))


_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore between letters is none


def strong(text: str) -> Markdown:
    shown = escaped(text)
    return Markdown(f"**{shown}**" if shown else "")


def code(text: str) -> Markdown:
    """In a code span, where nothing in it could end that; as :func:`escaped` otherwise."""
    return Markdown(f"`{text}`") if _NAME.fullmatch(text) else escaped(text)


_NAME = re.compile(r"[\w./:+-]+( [\w./:+-]+)*")


def link(text: str, address: str) -> Markdown:
    """A text that leads to a file, whose path needs no quoting."""
    return Markdown(f"[{escaped(text)}]({address})")


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; the first column is left-aligned, the others are centred."""
    rule = [Markdown(":---"), *[Markdown(":---:")] * (len(headers) - 1)]
    return "".join("| " + " | ".join(map(escaped, cells)) + " |\n" for cells in [headers, rule, *rows])


def _emphasised(text: str) -> str:
    return f"*{text}*"


@dataclass(frozen=True)
class Marks:
    """How a sentence is written: what a text in it becomes, plain, strong or as code, and the sentence as a whole."""

    text: Callable[[str], str]
    strong: Callable[[str], str]
    code: Callable[[str], str]
    whole: Callable[[str], str]


MARKDOWN = Marks(escaped, strong, code, _emphasised)
NONE = Marks(plain, plain, plain, plain)  # for pages, which escape what they show
