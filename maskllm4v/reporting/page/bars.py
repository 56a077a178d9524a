"""Bars: one metric of every row, with its spread and a dot a seed."""

from __future__ import annotations

import pandas as pd
from markupsafe import Markup

from maskllm4v.config.metrics import Metric
from maskllm4v.reporting.page.frame import Frame
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import Scale, linear_scale, logarithmic
from maskllm4v.reporting.page.stack import Place, heading, stacked
from maskllm4v.reporting.page.svg import Drawing, drawing, marked, tag
from maskllm4v.reporting.tables import number

WIDTH, VALUE = 480.0, 96.0  # pixels of the chart, and of the numbers at its right
BAR, GAP = 11.0, 12.0  # height of a bar, and what is left below it
WIDE = 5.0  # a spread from which on an axis that has no upper end is logarithmic
NOTE = "Mean over seeds, standard deviation as a line, a dot a seed; the dashed line is the dense model."
SMALL = 5.0  # percent from which on bars need not start at zero


def bar_charts(results: Results) -> list[Drawing]:
    """A chart for each metric of the task that has one and that some row has."""
    found = (_chart(results, results.metrics[name]) for name in results.metrics.bars)
    return [chart for chart in found if chart is not None]


def _chart(results: Results, metric: Metric) -> Drawing | None:
    """Rows from top to bottom, a label and the number above each bar; None where no row has the metric."""
    rows = [row for row in results.lines if pd.notna(results.lines[row][f"{metric.name}_mean"])]
    if not rows:
        return None
    scale = _scale(results, metric, rows)
    places = stacked(results, rows, BAR, GAP)
    frame = Frame(12, 0, WIDTH - VALUE, places[-1].lower + GAP, scale)
    downwards = metric == results.metrics.headline and results.metrics.better == "lower"
    below = metric.on_axes + (", lower is better" if downwards else "")
    if scale.log:
        below += ", logarithmic"
    elif scale.ticks[0] > 0:
        below += f", bars start at {scale.label(scale.ticks[0])}"
    return drawing(
        f"{metric.on_axes} by method",
        "A bar a row: mean over seeds, standard deviation as a line, a dot a seed; dashed: the dense model.",
        WIDTH,
        frame.bottom + 42,
        frame.axes(below),
        _dense_line(results, metric, frame),
        *(_bar(results, metric, place, frame) for place in places),
        name="bars",
    )


def _scale(results: Results, metric: Metric, rows: list[str]) -> Scale:
    values = [value for row in rows for value in results.seeds(row, metric.name).values()]
    for line in (results.lines[row] for row in rows):
        mean, std = line[f"{metric.name}_mean"], line[f"{metric.name}_std"]
        values += [mean] if pd.isna(std) else [mean - std, mean + std]
    if metric.percent:
        smallest = min(values)
        return linear_scale([min(100.0, max(0.0, smallest)), 100.0] if smallest > SMALL else [0.0, 100.0])
    if 0 < min(values) < max(values) / WIDE:
        return logarithmic(values)
    return linear_scale([0.0, *values])


def _bar(results: Results, metric: Metric, place: Place, frame: Frame) -> Markup:
    row, upper, middle = place.row, place.upper, place.middle
    line, seeds = results.lines[row], results.seeds(row, metric.name)
    mean, std = line[f"{metric.name}_mean"], line[f"{metric.name}_std"]
    text = number(mean, std, metric.digits)
    zero = frame.x(max(frame.across.ticks[0], min(0.0, frame.across.ticks[-1])))
    end, shows = frame.x(mean), marked(row, metric.name)
    marks = [
        heading(results, place, frame.left),
        tag("text", text, x=WIDTH, y=middle + 4.5, text_anchor="end", class_="value", **shows),
        tag("rect", x=min(zero, end), y=upper, width=abs(end - zero), height=BAR, class_="bar", **shows),
        tag("path", d=f"M{end:.1f} {upper:.1f}v{BAR:.0f}", class_="mean", **shows),
    ]
    if pd.notna(std):
        ends = frame.x(mean - std), frame.x(mean + std)
        marks.append(tag("path", d=f"M{ends[0]:.1f} {middle:.1f}H{ends[1]:.1f}", class_="spread", **shows))
    for seed, value in seeds.items() if len(seeds) > 1 else ():
        title = tag("title", f"seed {seed}: {value:.{metric.digits}f}")
        marks.append(tag("circle", title, cx=frame.x(value), cy=middle, r=2.6, **marked(row, metric.name, seed)))
    return tag("g", tag("title", f"{results.labels[row]}: {text}", **shows), *marks, class_=f"k-{line['kind']}")


def _dense_line(results: Results, metric: Metric, frame: Frame) -> Markup:
    mean = results.lines[results.dense][f"{metric.name}_mean"]
    if pd.isna(mean):
        return Markup("")
    x = frame.x(mean)
    shows = marked(results.dense, metric.name)
    return tag("path", d=f"M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}", class_="dense-line", **shows)
