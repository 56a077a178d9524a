"""From which digit on two numbers differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

from maskllm4v.receipts.model import Difference


def first_digit(one: float, other: float) -> int | None:
    """The significant digit of the larger number from which on two numbers differ, from 1; None if they are equal.

    It is the first one that differs in their decimals: the 3rd of 83.5 and 83.412. A carry does not count, but the
    place of the difference: 94.99999 and 95.00001 differ from the 7th digit on. Numbers that are not finite, and those
    with different signs, differ from the first digit on.
    """
    if one == other:
        return None
    if not (math.isfinite(one) and math.isfinite(other)) or min(one, other) <= 0 <= max(one, other):
        return 1
    parts = [Decimal(repr(abs(float(number)))).as_tuple() for number in (one, other)]
    exponents = [int(part.exponent) for part in parts]
    wholes = [
        int("".join(map(str, part.digits))) * 10 ** (exponent - min(exponents))
        for part, exponent in zip(parts, exponents, strict=True)
    ]
    larger = str(max(wholes))
    smaller = str(min(wholes)).rjust(len(larger), "0")
    first = next(i for i, (a, b) in enumerate(zip(larger, smaller, strict=True)) if a != b)
    carried = int(larger[first]) - int(smaller[first]) == 1 and (larger[first + 1 :][:1], smaller[first + 1 :][:1]) == (
        "0",
        "9",
    )
    return len(larger) - len(str(max(wholes) - min(wholes))) + 1 if carried else first + 1


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
