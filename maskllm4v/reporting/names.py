"""Short names of rows, for places where the table is known anyway."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile


def short_names(rows: Iterable[str]) -> dict[str, str]:
    """Each row's key without the words that all of them begin with: ``maskllm-long`` of ``digits-maskllm-long``."""
    words = {row: row.split("-") for row in rows}
    heads = zip(*(found[:-1] for found in words.values()), strict=False)  # the last word always stays
    shared = len(list(takewhile(lambda head: len(set(head)) == 1, heads)))
    return {row: "-".join(found[shared:]) for row, found in words.items()}
