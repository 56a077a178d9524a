"""From which digit on two numbers differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

from maskllm4v.receipts.model import Difference


def first_digit(one: float, other: float) -> int | None:
    """The significant digit from which on two numbers differ, counted from 1; None if they are equal.

    It is the place of their difference's first digit in the larger of them, so that a carry does not count as
    a difference of all digits: 0.225545 and 0.225547 differ from the 6th digit on, 94.99999 and 95.00001 from the 7th.
    Numbers that are not finite, and those with different signs, differ from the first digit on.
    """
    if one == other:
        return None
    if not (math.isfinite(one) and math.isfinite(other)):
        return 1
    first, second = Decimal(repr(float(one))), Decimal(repr(float(other)))
    larger = max(abs(first), abs(second))
    return max(1, larger.adjusted() - (first - second).adjusted() + 1)


def ordinal(number: int) -> str:
    """``1st``, ``2nd``, ``3rd``, ``4th``, ``11th``, ..."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


Metrics = Mapping[str, Mapping[str, float]]  # by seed, then by name


def metric_differences(committed: Metrics, here: Metrics) -> list[Difference]:
    """The metrics that both have and that differ, by seed."""
    found = []
    for seed in committed:
        for metric, value in committed[seed].items():
            own = here.get(seed, {}).get(metric)
            if own is not None and (digit := first_digit(value, own)) is not None:
                found.append(Difference(metric=metric, seed=int(seed), committed=value, here=own, digit=digit))
    return found
