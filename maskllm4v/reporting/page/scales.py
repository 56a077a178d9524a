"""Axes: numbers to places between 0 and 1, with ticks at round numbers.

Ends are rounded outwards to ticks, so that the last digit of one number does not move the marks of all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """From ``ticks[0]`` to ``ticks[-1]``."""

    ticks: tuple[float, ...]
    log: bool = False
    decimals: int = 0

    def __call__(self, value: float) -> float:
        """0 at the low end, 1 at the high one; what lies beyond an end is put there."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            value, low, high = (math.log10(max(number, self.ticks[0])) for number in (value, low, high))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def label(self, tick: float) -> str:
        if self.log:
            return f"{tick:,.0f}" if tick >= 1 else f"{tick:.{-round(math.log10(tick))}f}"
        return f"{tick:,.{self.decimals}f}"


def linear_scale(
    values: Iterable[float], *, low: float | None = None, high: float | None = None, count: int = 5
) -> Scale:
    """Ends beyond all values, about ``count`` steps between; ``low`` and ``high`` are ends that nothing passes."""
    numbers = [*values, *(end for end in (low, high) if end is not None)]
    smallest, largest = min(numbers), max(numbers)
    rough = (largest - smallest or abs(largest) or 1.0) / count
    power = math.floor(math.log10(rough))
    step = next(nice for nice in (step * 10.0**power for step in STEPS) if nice >= rough * (1 - 1e-9))
    first, last = math.floor(smallest / step + 1e-9), math.ceil(largest / step - 1e-9)
    last = max(last, first + 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Scale(tuple(round(step * number, decimals) for number in range(first, last + 1)), decimals=decimals)


def logarithmic(values: Iterable[float]) -> Scale:
    """Whole powers of ten around values above 0."""
    numbers = list(values)
    first, last = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))
    return Scale(tuple(10.0**power for power in range(first, max(last, first + 1) + 1)), log=True)
