"""The numbers of a run as points: (metric, step, value). All runs name and compute them alike, live or not."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.reporting.metrics import by_timestep, metrics_of
from maskllm4v.runs.curves import read_curve

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Metric

Point = tuple[str, int, float]
Curve = Sequence[Mapping[str, float]]


def final_points(record: Mapping[str, Any], line: pd.Series[Any]) -> Iterator[Point]:
    """``top1`` (mean), ``top1/std``, ``top1/seed0`` and so on, and the headline's paired difference to dense.

    The means alone have names without a slash, so that the UI shows them together, before all others.
    """
    from maskllm4v.reporting.aggregate import seed_metrics

    task = metrics_of(record["settings"]["task"]["name"])
    headline, decimals = task.headline.name, task.decimals  # as in table.csv; the UI's columns are narrow
    found: dict[str, float] = {}
    for name, values in seed_metrics(record).items():
        if not any(by_timestep({str(name): 0.0})):  # those are lines of their own
            found |= {str(name): round(values.mean(), decimals), f"{name}/std": round(values.std(), decimals)}
            found |= {f"{name}/seed{seed}": value for seed, value in values.items()}
    delta, spread = round(line["delta_mean"], decimals), round(line["delta_std"], decimals)
    found |= {f"{headline}/delta": delta, f"{headline}/delta_std": spread}
    found |= {f"parameters/{name}": count for name, count in record["parameters"].items()}
    return ((name, 0, float(value)) for name, value in found.items() if not math.isnan(value))


def curve_points(folder: Path) -> Iterator[Point]:
    """A row's committed training curves, each seed's and their mean."""
    curves = {path.stem: read_curve(path) for path in sorted(folder.glob("curves/seed*.csv"))}
    for seed, curve in curves.items():
        yield from seed_points(seed, curve)
    yield from mean_points(list(curves.values()))


def seed_points(seed: str, curve: Curve) -> Iterator[Point]:
    """``train/<column>/seed0``."""
    for point in curve:
        for column, value in point.items():
            if column != "step":
                yield f"train/{column}/{seed}", int(point["step"]), value


def mean_points(curves: Sequence[Curve]) -> Iterator[Point]:
    """``train/<column>``: the mean over seeds of each point that all of them have."""
    for points in zip(*curves, strict=False):
        if len({point["step"] for point in points}) == 1:
            for column in points[0]:
                if column != "step":
                    yield f"train/{column}", int(points[0]["step"]), sum(p[column] for p in points) / len(points)


def timestep_points(record: Mapping[str, Any]) -> Iterator[Point]:
    """Metrics by timestep of the noise schedule, as (``timesteps/<metric>``, timestep, mean over seeds)."""
    from maskllm4v.reporting.aggregate import timestep_metrics

    for name, values in timestep_metrics(record).items():
        for timestep, value in values.items():
            yield f"timesteps/{name}", timestep, value


def as_metrics(points: Sequence[Point]) -> list[Metric]:
    """As MLflow takes them; the step is the time, too, so that points sent twice are the same ones."""
    from mlflow.entities import Metric

    return [Metric(key, value, step, step) for key, step, value in points]


def as_stored(point: Point) -> tuple[str, int, str]:
    """A point as it comes back from a store, which knows no infinite numbers, to be compared."""
    key, step, value = point
    return key, step, repr(max(min(value, sys.float_info.max), -sys.float_info.max) if value == value else value)
