"""The figure with a bar a row: how good each one is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.reporting.figures.labels import COLOURS, row_labels
from maskllm4v.reporting.metrics import METRICS, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 5.0  # a spread from which on an axis that has no upper end is logarithmic


def bars(experiment: Experiment, table: pd.DataFrame) -> Figure | None:
    """The task's main metrics of every row, a panel each: mean and standard deviation over seeds."""
    from matplotlib.figure import Figure

    task = METRICS[experiment.task.name]
    measured = table.dropna(subset=[f"{task.headline.name}_mean"]).iloc[::-1]
    shown = [task[name] for name in task.bars if measured[f"{name}_mean"].notna().any()]
    if measured.empty:
        return None
    labels = measured["row"].map(row_labels(experiment))
    if not labels.is_unique:
        labels = measured["row"]
    figure = Figure(figsize=(8 if len(shown) == 1 else 10, 0.6 + 0.32 * len(measured)))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, shown, strict=True):
        downwards = metric == task.headline and task.better == "lower"
        _panel(axes, metric, f"{metric.on_axes}, lower is better" if downwards else metric.on_axes, labels, measured)
    return figure


def _panel(axes: Axes, metric: Metric, text: str, labels: pd.Series[str], measured: pd.DataFrame) -> None:
    mean, spread = measured[f"{metric.name}_mean"], measured[f"{metric.name}_std"].fillna(0)
    axes.barh(
        labels,
        mean,
        xerr=spread,
        color=[COLOURS[kind] for kind in measured["kind"]],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    dense = mean[measured["kind"] == "dense"].dropna()
    if len(dense):
        axes.axvline(float(dense.iloc[0]), color=COLOURS["dense"], linewidth=0.8, linestyle="--")
    if metric.percent:
        low = float((mean - spread).min())
        axes.set_xlim(max(0.0, low - 5), 100)
        axes.set_xlabel(f"{text}, bars start off zero" if low > 5 else text)
    elif 0 < mean.min() < mean.max() / WIDE:
        axes.set_xscale("log")
        axes.set_xlim(float(mean.min()) / 2, None)
        axes.set_xlabel(f"{text}, logarithmic")
    else:
        axes.set_xlabel(text)
    axes.grid(visible=False, axis="y")
