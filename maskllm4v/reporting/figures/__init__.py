"""Figures of a table, as SVG and PNG whose bytes depend on the records alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.files import replacing
from maskllm4v.layout import curve_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"dense": "#4c4c4c", "oneshot": "#9db4c8", "learned": "#2a6f97", "finetuned": "#c9a66b"}
STYLE = {
    "svg.hashsalt": "maskllm4v",  # otherwise element ids are random
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}


def draw_figures(experiment: Experiment, table: pd.DataFrame, reports: Path, folder: Path) -> list[Path]:
    """Draw all figures of a table into a folder; returns the files written."""
    from matplotlib import rc_context

    drawings: dict[str, Callable[[], Figure | None]] = {
        "accuracy": lambda: _accuracy(experiment, table),
        "curves": lambda: _curves(experiment, reports),
    }
    written: list[Path] = []
    with rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            if figure is not None:
                written += _save(figure, folder / name)
    return written


def _accuracy(experiment: Experiment, table: pd.DataFrame) -> Figure | None:
    """Top-1 of every row: mean, standard deviation, and each seed's value behind it."""
    from matplotlib.figure import Figure

    measured = table.dropna(subset=["top1_mean"]).iloc[::-1]
    if measured.empty:
        return None
    labels = measured["row"].map(row_labels(experiment))
    figure = Figure(figsize=(8, 0.6 + 0.32 * len(measured)))
    axes = figure.subplots()
    axes.barh(
        labels if labels.is_unique else measured["row"],
        measured["top1_mean"],
        xerr=measured["top1_std"].fillna(0),
        color=[COLOURS[kind] for kind in measured["kind"]],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    dense = table.loc[table["kind"] == "dense", "top1_mean"]
    if dense.notna().all():
        axes.axvline(float(dense.iloc[0]), color=COLOURS["dense"], linewidth=0.8, linestyle="--")
    low = float((measured["top1_mean"] - measured["top1_std"].fillna(0)).min())
    axes.set_xlim(max(0.0, low - 5), 100)
    axes.set_xlabel("top-1 accuracy (%), bars start off zero" if low > 5 else "top-1 accuracy (%)")
    axes.grid(visible=False, axis="y")
    return figure


def _curves(experiment: Experiment, reports: Path) -> Figure | None:
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


def row_labels(experiment: Experiment) -> dict[str, str]:
    """What figures call each row: its label, its prior, and its pattern where the table has several."""
    patterns = {experiment.pattern_of(row) for row in experiment.rows} - {None}
    labels = {}
    for row, label in experiment.rows.items():
        start, pattern = experiment.mask_row(row), experiment.pattern_of(row)
        before = f"{pattern} " if pattern is not None and len(patterns) > 1 else ""
        labels[row] = before + label + (f" ← {experiment.rows[start]}" if start not in (None, row) else "")
    return labels


def read_curves(experiment: Experiment, reports: Path, row: str) -> pd.DataFrame | None:
    """All seeds' curves of a learned row, with a ``seed`` column; None where there are none."""
    paths = {seed: curve_file(experiment.table, row, seed, reports) for seed in experiment.seeds}
    frames = [pd.read_csv(path).assign(seed=seed) for seed, path in paths.items() if path.exists()]
    return pd.concat(frames, ignore_index=True) if frames else None


def _save(figure: Figure, stem: Path) -> list[Path]:
    written = []
    for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
        path = stem.with_suffix(f".{suffix}")
        with replacing(path) as temporary:
            arguments: dict[str, Any] = {**options, "format": suffix}
            figure.savefig(temporary, **arguments)
        written.append(path)
    return written
