"""From which significant digit on two numbers differ."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from maskllm4v.receipts.digits import first_digit, metric_differences, ordinal

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
METRICS = st.integers(1, 10**9).map(lambda number: number / 10**6)  # as records hold them, rounded to six decimals


@pytest.mark.parametrize(
    ("one", "other", "digit"),
    [
        (83.5, 83.412, 3),
        (0.225545, 0.225547, 6),
        (96.21802, 96.106785, 3),
        (95.0, 94.9, 3),
        (12.3456, 12.3461, 5),
        (1.0, 2.0, 1),
        (1e300, 1e-300, 1),
        (1e-7, 2e-7, 1),
        (5e-324, 1e-323, 1),
        (10.0, 1.0, 1),
        (94.99999, 95.00001, 7),  # a carry
        (0.9999, 1.0, 5),
        (100.0, 99.99, 5),
        (84.05, 83.96, 4),
        (-0.123, -0.124, 3),
        (-0.1, 0.1, 1),
        (0.0, 1e-9, 1),
        (1e-200, 2e-200, 1),
        (math.nan, 1.0, 1),
        (math.inf, 1.0, 1),
        (math.inf, -math.inf, 1),
    ],
)
def test_first_digit(one: float, other: float, digit: int) -> None:
    assert first_digit(one, other) == first_digit(other, one) == digit


@given(NUMBERS)
def test_equal_numbers_differ_nowhere(number: float) -> None:
    assert first_digit(number, number) is None
    assert first_digit(0.0, -0.0) is None


@given(NUMBERS, NUMBERS)
def test_order_and_sign_do_not_count(one: float, other: float) -> None:
    assert first_digit(one, other) == first_digit(other, one) == first_digit(-one, -other)


@given(METRICS, METRICS)
def test_digits_before_it_agree(one: float, other: float) -> None:
    """The difference is less than a unit of the digit before, and begins there or, after a borrow, later."""
    assume(one != other)
    digit = first_digit(one, other)
    assert digit is not None
    larger, difference = Decimal(repr(max(one, other))), abs(Decimal(repr(one)) - Decimal(repr(other)))
    assert difference < Decimal(1).scaleb(larger.adjusted() - digit + 2)
    assert digit <= larger.adjusted() - difference.adjusted() + 1


@given(st.text("0123456789", min_size=1, max_size=12), st.data())
def test_a_changed_digit_is_found(text: str, data: st.DataObject) -> None:
    """Where one digit of a number changes by more than one, it is that digit, wherever the point is."""
    digits = f"1{text}"
    place = data.draw(st.integers(0, len(digits) - 1))
    far = [new for new in "123456789" if abs(int(new) - int(digits[place])) > 1]
    changed = digits[:place] + data.draw(st.sampled_from(far)) + digits[place + 1 :]
    point = data.draw(st.integers(0, len(digits)))
    numbers = (float(f"{found[:point]}.{found[point:]}") for found in (digits, changed))
    assert first_digit(*numbers) == place + 1


def test_ordinals() -> None:
    found = [ordinal(number) for number in (1, 2, 3, 4, 10, 11, 12, 13, 21, 22, 101, 111, 112)]
    assert found == [
        "1st",
        "2nd",
        "3rd",
        "4th",
        "10th",
        "11th",
        "12th",
        "13th",
        "21st",
        "22nd",
        "101st",
        "111th",
        "112th",
    ]


def test_differences_of_metrics() -> None:
    committed = {"0": {"a": 1.0, "b": 2.0, "gone": 1.0}, "1": {"a": 3.0}, "2": {"a": 1.0}}
    here = {"0": {"a": 1.0, "b": 2.5, "new": 1.0}, "1": {"a": 3.25}}
    found = metric_differences(committed, here)
    assert [(d.seed, d.metric, d.committed, d.here, d.digit) for d in found] == [
        (0, "b", 2.0, 2.5, 2),
        (1, "a", 3.0, 3.25, 2),
    ]
    assert metric_differences(here, here) == []
