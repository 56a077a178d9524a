"""Figures of a table, as SVG and PNG whose bytes depend on the records alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.reporting.figures.bars import bars
from maskllm4v.reporting.figures.lines import curves, timesteps
from maskllm4v.reporting.figures.samples import DPI, samples
from maskllm4v.reporting.metrics import METRICS
from maskllm4v.utils.io import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "svg.hashsalt": "maskllm4v",  # otherwise element ids are random
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}
FORMATS: dict[str, dict[str, Any]] = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": DPI}}
PIXELS = {"samples": ("png",)}  # figures that are nothing but pixels


def draw_figures(
    experiment: Experiment,
    records: Mapping[str, Mapping[str, Any]],
    table: pd.DataFrame,
    reports: Path,
    folder: Path,
) -> list[Path]:
    """Draw all figures of a table into a folder; returns the files written.

    Args:
        experiment: whose table it is.
        records: its current ones, by row.
        table: what :func:`maskllm4v.reporting.aggregate.aggregate` makes of them.
        reports: where curves and pictures lie.
        folder: where figures go.
    """
    from matplotlib import rc_context

    drawings: dict[str, Callable[[], Figure | None]] = {
        METRICS[experiment.task.name].figure: lambda: bars(experiment, table),
        "curves": lambda: curves(experiment, reports),
        "timesteps": lambda: timesteps(experiment, records),
        "samples": lambda: samples(experiment, records, reports),
    }
    written: list[Path] = []
    with rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            if figure is not None:
                written += _save(figure, folder / name, PIXELS.get(name, tuple(FORMATS)))
    return written


def _save(figure: Figure, stem: Path, suffixes: tuple[str, ...]) -> list[Path]:
    written = []
    for suffix in suffixes:
        path = stem.with_suffix(f".{suffix}")
        with replacing(path) as temporary:
            figure.savefig(temporary, **FORMATS[suffix], format=suffix)
        written.append(path)
    return written
