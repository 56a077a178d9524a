"""The chart of what a method costs against how good it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from maskllm4v.reporting.benchmarks.costs import trained_length, whole_costs
from maskllm4v.reporting.page.frame import Frame
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import linear_scale, logarithmic
from maskllm4v.reporting.page.svg import Drawing, drawing, marked, tag
from maskllm4v.reporting.tables import number, significant

WIDTH, HEIGHT = 480.0, 420.0
RADIUS = 5.0
DENSE = "dense"  # the pattern of rows without one
Box = tuple[float, float, float, float]  # left, top, right, bottom
AROUND = tuple(  # where a number may stand, as seen from its point: close before far, beside before above
    (across * distance, up * distance)
    for distance in (12.0, 17.0, 23.0, 30.0, 38.0, 47.0, 57.0, 68.0)
    for across, up in ((1, 0), (-1, 0), (0.8, -0.7), (-0.8, -0.7), (0.8, 0.7), (-0.8, 0.7), (0, -1), (0, 1))
)


@dataclass(frozen=True)
class Budget:
    """What rows cost, by row, and in what."""

    costs: Mapping[str, float]
    axis: str
    log: bool


def budget_of(results: Results) -> Budget:
    """Measured seconds where there are any, otherwise the length of trainings; rows without either are absent.

    Either from the dense model on: an update of learned masks costs what learning them did, too.
    """
    experiment = results.experiment
    seconds = {row: line["cost_seconds"] for row, line in results.lines.items() if pd.notna(line["cost_seconds"])}
    if seconds:
        return Budget(
            whole_costs(experiment, seconds), "seconds for one seed from the dense model on, logarithmic", True
        )
    trained = {**experiment.learned, **experiment.finetuned}
    unit = "epochs" if any(training.epochs is not None for training in trained.values()) else "steps"
    known = [r for r in experiment.rows if r != results.dense and (r not in trained or getattr(trained[r], unit))]
    return Budget({row: trained_length(experiment, row, unit) for row in known}, f"{unit} of training", False)


def budget_charts(results: Results) -> dict[str, Drawing]:
    """A chart a pattern, by pattern: rows as far apart as 1:4 and 2:4 would leave each other no room."""
    patterns = [p for p in dict.fromkeys(str(line["pattern"]) for line in results.lines.values()) if p != DENSE]
    charts = {pattern: _chart(results, pattern) for pattern in patterns}
    return {pattern: chart for pattern, chart in charts.items() if chart is not None}


def _chart(results: Results, pattern: str) -> Drawing | None:
    """A point a row of the pattern or dense, called by its number; the dense model is a band."""
    metric, budget = results.metrics.headline, budget_of(results)
    known = [row for row in results.measured if row in budget.costs and row != results.dense]
    rows = [row for row in known if results.lines[row]["pattern"] in (pattern, DENSE)]
    if all(results.lines[row]["pattern"] == DENSE for row in rows):
        return None
    spans = {row: _span(results, row) for row in [*rows, *(r for r in [results.dense] if r in results.measured)]}
    values = [value for span in spans.values() for value in span]
    costs = [budget.costs[row] for row in rows]
    up = linear_scale([min(100.0, max(0.0, value)) for value in values] if metric.percent else values, count=8)
    frame = Frame(
        40, 26, WIDTH - 18, HEIGHT - 42, logarithmic(costs) if budget.log else linear_scale([0.0, *costs]), up
    )
    points = {row: (frame.x(budget.costs[row]), frame.y(results.lines[row][f"{metric.name}_mean"])) for row in rows}
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points.values()]
    taken += [(points[row][0] - 1, frame.y(spans[row][1]), points[row][0] + 1, frame.y(spans[row][0])) for row in rows]
    better = "lower is better" if results.metrics.better == "lower" else "higher is better"
    marks = [_point(results, row, budget, frame, points[row], taken) for row in rows]
    return drawing(
        f"{metric.on_axes} against cost, {pattern}",
        "A point a row, numbered as in the table, with its standard deviation; grey: the dense model.",
        WIDTH,
        HEIGHT,
        frame.axes(budget.axis),
        tag("text", f"{pattern}: {metric.on_axes}, {better}", x=8.0, y=14.0, class_="title"),
        _band(results, frame),
        *marks,
        name="budget",
    )


def _span(results: Results, row: str) -> tuple[float, float]:
    name, line = results.metrics.headline.name, results.lines[row]
    spread = 0.0 if pd.isna(line[f"{name}_std"]) else float(line[f"{name}_std"])
    return float(line[f"{name}_mean"]) - spread, float(line[f"{name}_mean"]) + spread


def _band(results: Results, frame: Frame) -> Markup:
    if results.dense not in results.measured:
        return Markup("")
    metric, shows = results.metrics.headline, marked(results.dense, results.metrics.headline.name)
    line = results.lines[results.dense]
    mean, std = line[f"{metric.name}_mean"], line[f"{metric.name}_std"]
    low, high = (frame.y(value) for value in _span(results, results.dense))
    y = frame.y(mean)
    marks = [
        tag("title", f"{results.labels[results.dense]}: {number(mean, std, metric.digits)}", **shows),
        tag("path", d=f"M{frame.left:.1f} {y:.1f}H{frame.right:.1f}", class_="dense-line", **shows),
        tag("text", "dense", x=frame.left + 6, y=y - 5, class_="name", **shows),
    ]
    if pd.notna(std):
        width = frame.right - frame.left
        marks.insert(1, tag("rect", x=frame.left, y=high, width=width, height=low - high, class_="band", **shows))
    return tag("g", *marks, class_="k-dense")


def _point(
    results: Results, row: str, budget: Budget, frame: Frame, point: tuple[float, float], taken: list[Box]
) -> Markup:
    metric, line, cost = results.metrics.headline, results.lines[row], budget.costs[row]
    x, y = point
    low, high = (frame.y(value) for value in _span(results, row))
    shows, text = marked(row, metric.name), f"{results.numbers[row]}"
    dx, dy = _free(text, x, y, taken, frame)
    value = number(line[f"{metric.name}_mean"], line[f"{metric.name}_std"], metric.digits)
    marks = [
        tag("title", f"{results.labels[row]}: {value} at {significant(cost)} {budget.axis.split()[0]}", **shows),
        tag("circle", cx=x, cy=y, r=RADIUS, **shows),
    ]
    if low > high:
        marks.insert(1, tag("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_="spread", **shows))
    if max(abs(dx), abs(dy)) > 16:
        marks.append(tag("path", d=f"M{x:.1f} {y:.1f}L{x + dx * 0.7:.1f} {y + dy * 0.7:.1f}", class_="leader", **shows))
    marks.append(tag("text", text, x=x + dx, y=y + dy + 4, text_anchor="middle", class_="number", **shows))
    return tag("g", *marks, class_=f"k-{line['kind']}")


def _free(text: str, x: float, y: float, taken: list[Box], frame: Frame) -> tuple[float, float]:
    """Where a number goes, from its point: the first place that collides with nothing, which is then taken."""
    half = 4.0 * len(text) + 1
    for dx, dy in AROUND:
        box = (x + dx - half, y + dy - 7, x + dx + half, y + dy + 7)
        inside = frame.left < box[0] and box[2] < frame.right + 10 and frame.top < box[1] and box[3] < frame.bottom
        if inside and not _overlaps(box, taken):
            taken.append(box)
            return dx, dy
    return AROUND[0]


def _overlaps(box: Box, others: Iterable[Box]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)
