"""Progress bars: there for a person at a terminal, silent everywhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T], description: str, *, total: int | None = None, position: int = 0) -> Iterable[T]:
    """Iterate with a bar on standard error if that is a terminal.

    Args:
        items: what to iterate over.
        description: shown before the bar.
        total: length, where ``items`` has none.
        position: line of the bar, for runs side by side.
    """
    return tqdm(items, description, total=total, position=position, disable=None, leave=False, dynamic_ncols=True)
