"""What each task measures and how tables show it, so that nothing behind a record has to know a task."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A number of a record.

    Attributes:
        name: its key in records, and its column's in ``table.csv``.
        header: of its column in a table.
        digits: decimals that a table shows.
        about: what captions say on it, if its header does not say all.
        noun: what sentences call it; by default the header.
        axis: what axes call it; by default the header.
        percent: whether it ends at 100.
        better: which way it gets better.
    """

    name: str
    header: str
    digits: int
    about: str = ""
    noun: str = ""
    axis: str = ""
    percent: bool = False
    better: Literal["higher", "lower"] = "higher"

    @property
    def in_sentences(self) -> str:
        return self.noun or self.header

    @property
    def on_axes(self) -> str:
        return self.axis or self.header


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of a task.

    Attributes:
        columns: those that a table has a column for, in its order; the first one is the :attr:`headline`.
        figure: name of the figure with bars.
        bars: names of the metrics in that figure, a panel each.
        decimals: of ``table.csv`` and ``metrics.json``.
        facts: what captions say on metrics of the dense row that are no columns, by name: a format of the value.
    """

    columns: tuple[Metric, ...]
    figure: str
    bars: tuple[str, ...]
    decimals: int = 4
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def headline(self) -> Metric:
        """What rows are compared by: to the dense model, and in figures."""
        return self.columns[0]

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which way the headline gets better; its axis says so where that is downwards."""
        return self.headline.better

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.columns)

    def __getitem__(self, name: str) -> Metric:
        return next(metric for metric in self.columns if metric.name == name)

    @property
    def captions(self) -> list[str]:
        """What captions say on the columns."""
        return [metric.about for metric in self.columns if metric.about]


METRICS = {
    "classification": TaskMetrics(
        columns=(
            Metric("top1", "Top-1 (%)", 2, noun="top-1", axis="top-1 accuracy (%)", percent=True),
            Metric("top5", "Top-5 (%)", 2, percent=True),
            Metric("nll", "Cross-entropy", 3, better="lower"),
            Metric("ece", "ECE (%)", 1, "ECE: expected calibration error, 15 bins", percent=True, better="lower"),
            Metric("agreement", "Agreement (%)", 1, "agreement: same top-1 class as the dense model", percent=True),
        ),
        figure="accuracy",
        bars=("top1",),
    ),
    "diffusion": TaskMetrics(
        columns=(
            Metric(
                "eps_mse",
                "ε-MSE",
                4,
                "ε-MSE: mean squared error of the predicted noise, lower is better",
                better="lower",
            ),
            Metric(
                "dense_mse",
                "MSE to dense",
                4,
                "MSE to dense: mean squared distance of the outputs to the dense model's",
                better="lower",
            ),
            Metric(
                "accuracy",
                "Conditional accuracy (%)",
                1,
                "conditional accuracy: share of samples that a classifier trained here takes for their class",
                axis="conditional accuracy (%)",
                percent=True,
            ),
            Metric(
                "fd",
                "FD (our classifier)",
                2,
                "FD: Fréchet distance in that classifier's features, not FID",
                better="lower",
            ),
            Metric("kd", "KD (our classifier)", 4, "KD: kernel distance, likewise", better="lower"),
        ),
        figure="quality",
        bars=("accuracy", "eps_mse"),
        decimals=6,
        facts=(("judge_accuracy", "it gets {:.1f} % of the real images right"),),
    ),
}

_AT_TIMESTEP = re.compile(r"(?P<name>\w+)/t(?P<timestep>\d{4})")


def by_timestep(metrics: Mapping[str, float]) -> Iterator[tuple[str, int, float]]:
    """Metrics at one timestep of the noise schedule, ``eps_mse/t0050``, as (name, timestep, value); no others."""
    for key, value in metrics.items():
        if found := _AT_TIMESTEP.fullmatch(key):
            yield found["name"], int(found["timestep"]), value
