"""Lists in messages: the first few, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3


def few(names: Sequence[str], of: str = "", shown: int = SHOWN) -> str:
    """``'a', 'b', 'c' and 4 more``, after ``of`` as a noun in singular or plural: ``layers 'a' and 'b'``."""
    *first, last = [repr(name) for name in names[:shown]]
    more = len(names) - shown
    ends = [*first, last, f"{more:,} more"] if more > 0 else [*first, last]
    listed = f"{', '.join(ends[:-1])} and {ends[-1]}" if len(ends) > 1 else last
    return f"{of}{'s' if len(names) > 1 else ''} {listed}" if of else listed
