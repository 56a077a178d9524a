"""What pruning breaks first: a line a row, a column a part of the images or a class, shaded by the loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import pandas as pd

from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.parts import DIGITS, break_down
from maskllm4v.reporting.tables import number

CLASSES = 20  # at most: those that lose the most


@dataclass(frozen=True)
class Loss:
    """A cell; ``shade`` is the loss in percent of its row's greatest one: patterns differ too much for one scale."""

    metric: str
    text: str
    about: str
    shade: int


@dataclass(frozen=True)
class Losses:
    """``blocks`` are what columns have in common, and their headers; the dense model's line comes first."""

    blocks: list[tuple[str, list[str]]]
    lines: dict[str, list[Loss]]
    captions: list[str]
    left_out: int


def losses(results: Results) -> Losses | None:
    """None where there is nothing to break down."""
    found = break_down(results.experiment, results.records)
    if found is None:
        return None
    parts = found.with_classes(CLASSES)
    sign = 1 if results.metrics.better == "higher" else -1
    lines = {results.dense: [_cell(part.name, found.dense[part.name], 0, sign=False) for part in parts]}
    for row, frame in found.differences.items():
        means = sign * frame.mean()
        lost = {part.name: max(0.0, -float(means[part.name])) for part in parts}
        greatest = max(lost.values()) or 1.0
        lines[row] = [
            _cell(f"{name}/delta", frame[name], round(100 * loss / greatest), sign=True) for name, loss in lost.items()
        ]
    blocks = [
        ("class" if is_class else "part", [part.header for part in of_kind])
        for is_class, of_kind in groupby(parts, lambda part: part.is_class)
    ]
    captions = [metric.about for metric in results.metrics.parts if metric.about]
    return Losses(blocks, lines, captions, len(found.parts) - len(parts))


def _cell(metric: str, by_seed: pd.Series[float], shade: int, *, sign: bool) -> Loss:
    mean = float(by_seed.mean())
    seeds = ", ".join(f"seed {seed}: {value:{'+' if sign else ''}.2f}" for seed, value in by_seed.items())
    return Loss(metric, number(mean, float("nan"), DIGITS, sign), seeds, shade)
