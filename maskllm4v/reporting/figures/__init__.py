"""Figures of a table: the charts of its page as SVG files, and pictures of its models at work as a PNG."""

from __future__ import annotations

from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.reporting.figures.samples import samples_file
from maskllm4v.reporting.figures.sheet import Entry, sheet
from maskllm4v.reporting.page import bars, lines, pictures
from maskllm4v.reporting.page.results import KINDS, Results
from maskllm4v.reporting.page.svg import Drawing, tag


def figure_files(experiment: Experiment, reports: Path) -> dict[str, bytes]:
    """All figures of a table by file name.

    Args:
        experiment: whose table it is.
        reports: where records, curves and pictures lie.
    """
    files = {name: text.encode() for name, text in figure_texts(experiment, reports).items()}
    results = Results(experiment, reports)
    kind = pictures.kind_of(results)
    return files if kind is None else {**files, f"{kind.name}.png": samples_file(results, kind)}


def figure_texts(experiment: Experiment, reports: Path) -> dict[str, str]:
    """The files of a table's charts by name: same records, same bytes."""
    results = Results(experiment, reports)
    drawn = {
        results.metrics.figure: _bars(results),
        "curves": _lines(results, "Training curves", lines.NOTE, lines.curve_panels(results)),
        "timesteps": _lines(results, "By timestep", "Mean over seeds.", lines.timestep_panels(results)),
    }
    return {f"{name}.svg": text for name, text in drawn.items() if text}


def _bars(results: Results) -> str:
    kinds = [kind for kind in KINDS if kind in {results.kind(row) for row in results.measured}]
    dot = tag("circle", cx=9.0, cy=-4.0, r=4.5)
    legend = [Entry(tag("g", dot, class_="bars"), KINDS[kind], kind) for kind in kinds]
    return _sheet(results, "By method", bars.NOTE, bars.bar_charts(results), legend)


def _lines(results: Results, title: str, note: str, panels: lines.Panels) -> str:
    stroke = tag("path", d="M0 -4h18")
    legend = [
        Entry(
            tag("g", stroke, class_=f"line {style}"), results.labels[row], results.kind(row), f"{results.numbers[row]}"
        )
        for row, style in panels.styles.items()
    ]
    return _sheet(results, title, note, panels.charts, legend)


def _sheet(results: Results, title: str, note: str, charts: list[Drawing], legend: list[Entry]) -> str:
    """Empty without a chart."""
    return sheet(f"{results.experiment.title}: {title}", note, charts, legend) if charts else ""
