"""Axes: round ends that hold all values, and places of numbers between them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskllm4v.reporting.page.scales import linear_scale, logarithmic
from maskllm4v.reporting.page.svg import at, attributes, tag

VALUES = st.lists(
    st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda value: round(value, 6)), min_size=1, max_size=9
)


@given(VALUES)
def test_linear_axis_holds_all_values_between_even_ticks(values: list[float]) -> None:
    scale = linear_scale(values)
    low, high = scale.ticks[0], scale.ticks[-1]
    slack = (high - low) * 1e-6
    assert low - slack <= min(values) <= max(values) <= high + slack
    steps = [b - a for a, b in zip(scale.ticks, scale.ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    assert 1 <= len(steps) <= 7
    assert len({scale.label(tick) for tick in scale.ticks}) == len(scale.ticks)
    assert [scale(tick) for tick in (low, high)] == [0, 1]


@given(VALUES)
def test_places_keep_the_order_of_values(values: list[float]) -> None:
    scale = linear_scale(values)
    places = [scale(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_logarithmic_axis_goes_from_one_power_of_ten_to_another(values: list[float]) -> None:
    scale = logarithmic(values)
    assert scale.ticks[0] <= min(values) * (1 + 1e-9)
    assert scale.ticks[-1] >= max(values) * (1 - 1e-9)
    assert all(math.log10(tick) == pytest.approx(round(math.log10(tick))) for tick in scale.ticks)
    places = [scale(tick) for tick in scale.ticks]
    assert places == pytest.approx([n / (len(places) - 1) for n in range(len(places))])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([83.1, 96.7], ["80", "85", "90", "95", "100"]),
        ([0.0, 0.21], ["0.00", "0.05", "0.10", "0.15", "0.20", "0.25"]),
        ([-0.004, 0.29], ["-0.1", "0.0", "0.1", "0.2", "0.3"]),
        ([0.0, 0.0], ["0.0", "0.2"]),
        ([7.5], ["6", "8"]),
    ],
)
def test_labels_of_linear_axes(values: list[float], labels: list[str]) -> None:
    scale = linear_scale(values)
    assert [scale.label(tick) for tick in scale.ticks] == labels


def test_labels_of_logarithmic_axes() -> None:
    scale = logarithmic([0.0076, 1200.0])
    assert [scale.label(t) for t in scale.ticks] == ["0.001", "0.01", "0.1", "1", "10", "100", "1,000", "10,000"]


def test_ends_are_not_passed() -> None:
    assert linear_scale([83.0, 99.9], high=100.0).ticks[-1] == 100.0
    assert linear_scale([0.3, 0.5], low=0.0).ticks[0] == 0.0


def test_the_last_digit_does_not_move_an_axis() -> None:
    assert linear_scale([84.2, 96.7]) == linear_scale([84.1, 96.8])
    assert logarithmic([0.02, 34.0]) == logarithmic([0.021, 35.0])


@pytest.mark.parametrize(("value", "text"), [(1.0, "1"), (1.25, "1.2"), (-0.04, "0"), (12.96, "13"), (-3.5, "-3.5")])
def test_coordinates_are_short(value: float, text: str) -> None:
    assert at(value) == text


def test_markup_is_escaped() -> None:
    assert tag("text", "a<b>&c", x=1.0, class_='"k"') == '<text x="1" class="&#34;k&#34;">a&lt;b&gt;&amp;c</text>'
    assert tag("path", d="M0 0", data_row=None, stroke_width=2) == '<path d="M0 0" stroke-width="2"/>'
    assert attributes({"data_row": "a&b"}) == ' data-row="a&amp;b"'
