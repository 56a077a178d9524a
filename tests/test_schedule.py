"""Learning rate, temperature and scaling against closed formulas."""

from __future__ import annotations

import math

import pytest

from maskllm4v.config import LearningSettings
from maskllm4v.training.schedule import cosine, lerp, progress, warm_up

DEFAULTS = LearningSettings()
LINEAR = [DEFAULTS.tau, DEFAULTS.scaling, (1.0, 1.0), (0.1, 0.7)]
COSINE = [(DEFAULTS.lr, DEFAULTS.min_lr), (1e-2, 1e-3), (1.0, 0.0), (0.3, 0.3)]


@pytest.mark.parametrize("steps", [2, 3, 10, 1999])
def test_steps_go_from_0_to_1_evenly(steps: int) -> None:
    shares = [progress(step, steps, 5, "step") for step in range(steps)]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == pytest.approx([k / (steps - 1) for k in range(steps)], abs=1e-15)


@pytest.mark.parametrize("anneal", ["step", "epoch"])
def test_one_step_stays_at_the_start(anneal: str) -> None:
    assert progress(0, 1, 5, anneal) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "steps_per_epoch", "expected"),
    [
        (10, 4, [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1]),
        (6, 2, [0, 0, 0.5, 0.5, 1, 1]),
        (4, 1, [0, 1 / 3, 2 / 3, 1]),
        (5, 4, [0, 0, 0, 0, 1]),
    ],
)
def test_epochs_move_once_each(steps: int, steps_per_epoch: int, expected: list[float]) -> None:
    assert [progress(step, steps, steps_per_epoch, "epoch") for step in range(steps)] == pytest.approx(expected)


@pytest.mark.parametrize("steps_per_epoch", [7, 8, 1000])
def test_nothing_moves_in_a_run_of_one_epoch(steps_per_epoch: int) -> None:
    assert {progress(step, 7, steps_per_epoch, "epoch") for step in range(7)} == {0.0}


@pytest.mark.parametrize(("first", "last"), LINEAR)
def test_line_ends_exactly(first: float, last: float) -> None:
    assert lerp(first, last, 0.0) == first
    assert lerp(first, last, 1.0) == last


@pytest.mark.parametrize(("first", "last"), COSINE)
def test_cosine_ends_exactly(first: float, last: float) -> None:
    assert cosine(first, last, 0.0) == first
    assert cosine(first, last, 1.0) == last


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25, 0.5, 0.9, 1.0])
def test_values_between(share: float) -> None:
    assert lerp(4.0, 0.05, share) == pytest.approx((1 - share) * 4.0 + share * 0.05, abs=1e-15)
    # (1 + cos x) / 2 = cos²(x / 2)
    weight = math.cos(math.pi * share / 2) ** 2
    assert cosine(1e-2, 1e-3, share) == pytest.approx(weight * 1e-2 + (1 - weight) * 1e-3, rel=1e-13)


def test_cosine_is_half_way_in_the_middle_and_falls() -> None:
    assert cosine(3.0, 1.0, 0.5) == pytest.approx(2.0)
    values = [cosine(1.0, 0.0, k / 50) for k in range(51)]
    assert values == sorted(values, reverse=True)
    assert values[5] > 1 - 5 / 50  # flat at first, unlike a line


def test_warm_up_rises_to_one_and_stays() -> None:
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("step", [0, 1, 99])
def test_no_warm_up(step: int) -> None:
    assert warm_up(step, 0) == 1.0
