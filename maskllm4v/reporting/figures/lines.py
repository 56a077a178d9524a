"""Figures with a line a row: over training steps, and over the timesteps of a noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import timestep_metrics
from maskllm4v.reporting.curves import read_curves
from maskllm4v.reporting.figures.labels import COLOURS, row_labels
from maskllm4v.reporting.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(experiment: Experiment, reports: Path) -> Figure | None:
    """Training curves of the learned rows, mean over seeds."""
    from matplotlib.figure import Figure

    frames = {row: frame for row in experiment.learned if (frame := read_curves(experiment, reports, row)) is not None}
    if not frames:
        return None
    panels = {
        "loss": "loss",
        "max_probability": "mean max-probability",
        "off_prior": "share of groups off the prior",
        "flipped": "share flipped since the last point",
        "grad_norm": "gradient norm",
        "kept_energy": "kept weight energy",
    }
    labels = row_labels(experiment)
    figure = Figure(figsize=(10, 5.6))
    grid = figure.subplots(2, 3, sharex=True)
    for axes, (column, title) in zip(grid.flat, panels.items(), strict=True):
        for number, (row, frame) in enumerate(frames.items()):
            mean = frame.groupby("step")[column].mean()
            axes.plot(mean.index, mean.to_numpy(), linewidth=1, color=f"C{number}", label=labels[row])
        axes.set_title(title, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def timesteps(experiment: Experiment, records: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Metrics that records hold by timestep, a panel each, mean over seeds; None where there are none."""
    from matplotlib.figure import Figure

    found = {row: timestep_metrics(record) for row, record in records.items()}
    shown = [m for m in METRICS[experiment.task.name].columns if any(m.name in of_row for of_row in found.values())]
    if not shown:
        return None
    labels = row_labels(experiment)
    figure = Figure(figsize=(10, 4.4))
    panels = figure.subplots(1, len(shown), sharex=True, squeeze=False)[0]
    lines = {}  # by label: a row may be missing from the first panel
    for axes, metric in zip(panels, shown, strict=True):
        for number, (row, of_row) in enumerate(found.items()):
            if metric.name in of_row:
                values = of_row[metric.name]
                colour = COLOURS["dense"] if row == experiment.dense.row else f"C{number % 10}"
                style = "--" if row == experiment.dense.row else "-"
                (lines[row],) = axes.plot(list(values), list(values.values()), style, linewidth=1, color=colour)
        axes.set_yscale("log")  # errors fall by orders of magnitude from the first timestep to the last
        axes.set_title(metric.on_axes, fontsize=9)
        axes.set_xlabel("timestep")
    names = [labels[row] for row in lines]
    figure.legend(list(lines.values()), names, loc="outside lower center", ncols=2, fontsize=8)
    return figure
