"""Progress bars and notes: there for a person at a terminal, silent everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from maskllm4v.utils.processes import is_main

T = TypeVar("T")


def note(text: str) -> None:
    """Lines on standard error if that is a terminal, above the bars."""
    if is_main() and sys.stderr.isatty():
        tqdm.write(text, file=sys.stderr)


def bar(
    items: Iterable[T], description: str, *, total: int | None = None, initial: int = 0, position: int = 0
) -> Iterable[T]:
    """Iterate with a bar on standard error if that is a terminal.

    Args:
        items: what to iterate over.
        description: shown before the bar.
        total: length, where ``items`` has none.
        initial: how many are done already.
        position: line of the bar, for runs side by side.
    """
    hidden = None if is_main() else True  # None: hidden where standard error is no terminal
    return tqdm(
        items,
        description,
        total=total,
        initial=initial,
        position=position,
        disable=hidden,
        leave=False,
        dynamic_ncols=True,
    )
