"""Small charts with a line a row: over training steps, and over the timesteps of a noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from maskllm4v.reporting.aggregate import timestep_metrics
from maskllm4v.reporting.curves import read_curves
from maskllm4v.reporting.page.frame import Frame
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import Scale, linear_scale, logarithmic
from maskllm4v.reporting.page.svg import Drawing, Point, drawing, marked, polyline, tag

WIDTH, HEIGHT = 380.0, 240.0
STYLES = 8  # colours of lines; rows beyond them get these again, dashed
CURVES = {  # columns of training curves, and what charts call them
    "loss": "loss",
    "max_probability": "mean max-probability",
    "off_prior": "share of groups off the prior",
    "flipped": "share flipped since the last point",
    "tau": "temperature τ",
    "scaling": "scaling of the logits",
}
NOTE = "Mean over seeds; bands reach from the least to the most of them."
SHARES = ("max_probability", "off_prior", "flipped")  # of which 1 is the most


@dataclass(frozen=True)
class Line:
    """A row's values, and between what they lie over seeds."""

    row: str
    points: Sequence[Point]
    low: Sequence[Point] = ()
    high: Sequence[Point] = ()


@dataclass(frozen=True)
class Panels:
    """Charts side by side, and the rows that their shared legend names, with the style of each."""

    charts: list[Drawing]
    styles: dict[str, str]


def curve_panels(results: Results) -> Panels:
    """Training curves of all rows that have some: mean over seeds, in a band from the least to the most."""
    experiment = results.experiment
    trained = [row for row in experiment.rows if row in (*experiment.learned, *experiment.finetuned)]
    current = (row for row in trained if row in results.records)
    found = {row: frame for row in current if (frame := read_curves(experiment, results.reports, row)) is not None}
    styles = _styles(list(found))
    charts = []
    across = linear_scale([0.0, max((int(frame["step"].max()) for frame in found.values()), default=0)], count=4)
    for column, title in CURVES.items():
        all_lines = (_over_steps(row, frame, column) for row, frame in found.items() if column in frame)
        lines = [line for line in all_lines if line.points]
        if not lines:
            continue
        ends = [value for line in lines for _, value in (*line.low, *line.high)]
        up = linear_scale([0.0, *ends], high=1.0 if column in SHARES and max(ends) > 0.5 else None, count=4)
        charts.append(_panel(results, title, column, lines, across, up, "step", styles))
    return Panels(charts, styles)


def timestep_panels(results: Results) -> Panels:
    """Metrics that records hold by timestep, a chart each, mean over seeds."""
    found = {row: timestep_metrics(record) for row, record in results.records.items()}
    metrics = [metric for metric in results.metrics.columns if any(metric.name in of for of in found.values())]
    styles = _styles([row for row in found if row != results.dense])
    if results.dense in found and metrics:
        styles = {results.dense: "s-dense", **styles}
    charts = []
    for metric in metrics:
        lines = [Line(row, list(of[metric.name].items())) for row, of in found.items() if metric.name in of]
        positive = [value for line in lines for _, value in line.points if value > 0]
        if not positive:
            continue
        up = logarithmic(positive)
        across = linear_scale([0.0, *(step for line in lines for step, _ in line.points)])
        title = f"{metric.on_axes}, logarithmic"
        charts.append(_panel(results, title, f"{metric.name}/t", lines, across, up, "timestep", styles))
    return Panels(charts, styles if charts else {})


def _styles(rows: list[str]) -> dict[str, str]:
    """A class a row: its colour, and dashes from the ninth row on."""
    return {row: f"s{place % STYLES}" + (" dashed" if place >= STYLES else "") for place, row in enumerate(rows)}


def _over_steps(row: str, frame: pd.DataFrame, column: str) -> Line:
    by_step = frame.groupby("step")[column].agg(["mean", "min", "max"]).dropna()
    steps = [float(step) for step in by_step.index]
    mean, low, high = (list(zip(steps, map(float, by_step[name]), strict=True)) for name in ("mean", "min", "max"))
    return Line(row, mean, low, high)


def _panel(
    results: Results,
    title: str,
    metric: str,
    lines: Sequence[Line],
    across: Scale,
    up: Scale,
    below: str,
    styles: dict[str, str],
) -> Drawing:
    frame = Frame(46, 30, WIDTH - 14, HEIGHT - 40, across, up)
    bands, strokes = [], []
    for line in lines:
        shows, style = marked(line.row, metric), styles[line.row]
        if line.low and line.low != line.high:
            around = _placed(frame, [*line.low, *reversed(line.high)])
            bands.append(tag("path", d=polyline(around) + "Z", class_=f"range {style}", **shows))
        path = tag("path", tag("title", results.labels[line.row]), d=polyline(_placed(frame, line.points)), **shows)
        strokes.append(tag("g", path, class_=f"line {style}"))
    return drawing(
        title,
        f"{title} by {below}, a line a row; bands are from the least to the most of its seeds.",
        WIDTH,
        HEIGHT,
        tag("text", title, x=2.0, y=14.0, class_="title"),
        frame.axes(below),
        *bands,
        *strokes,
        name="lines",
    )


def _placed(frame: Frame, points: Sequence[Point]) -> list[Point]:
    return [(frame.x(x), frame.y(y)) for x, y in points]
