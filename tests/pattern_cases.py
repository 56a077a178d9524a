"""Shapes of N:M patterns, and what a mask keeps, for tests."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import Tensor

SHAPES = [(n, m) for m in range(2, 9) for n in range(1, m)] + [(2, 12), (1, 70), (69, 70), (8, 16), (13, 16)]
nm = st.sampled_from(SHAPES)


def kept_positions(mask: Tensor, m: int) -> list[tuple[int, ...]]:
    return [tuple(j for j, keep in enumerate(group) if keep) for group in mask.reshape(-1, m).tolist()]
