"""A table's results as one HTML file: complete without a network, a server or a script, and exact to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.config import Experiment
from maskllm4v.reporting.page import (
    bars,
    budget,
    candidates,
    details,
    exports,
    headline,
    layers,
    lines,
    losses,
    pictures,
)
from maskllm4v.reporting.page.agreement import agreement_chart, seeds_note
from maskllm4v.reporting.page.masks import read_mask_statistics
from maskllm4v.reporting.page.results import KINDS, Results
from maskllm4v.reporting.page.svg import attributes, marked
from maskllm4v.reporting.page.tiles import read_tiles

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "index.html"  # in a table's folder, and in that of all tables
IN_FRONT = 2  # tiles that are shown at once; the others are folded away


def table_page(experiment: Experiment, reports: Path, file: str | None) -> str:
    """The page of one table.

    Args:
        experiment: whose table it is.
        reports: where records, curves and diagnostics lie.
        file: its name in ``experiments/``, without ``.yaml``; None if it stands in ``params.yaml`` alone.
    """
    results = Results(experiment, reports)
    measured = layers.read_layers(results)
    statistics = read_mask_statistics(results)
    drawn = read_tiles(results)
    return _render(
        "table.html",
        results=results,
        headers=headline.headers(results),
        table=headline.table_lines(results),
        champion=headline.winner(results),
        dense=headline.described(results, results.dense) if results.dense in results.measured else None,
        best={kind: headline.winner(results, (kind,)) for kind in headline.SPARSE},
        bars=bars.bar_charts(results),
        notes={"bars": bars.NOTE, "lines": lines.NOTE},
        budgets=budget.budget_charts(results),
        curves=lines.curve_panels(results),
        timesteps=lines.timestep_panels(results),
        output_error=layers.layer_table(results, measured, "output_error"),
        kept_energy=layers.layer_table(results, measured, "kept_energy", whole=True),
        prior_agreement=layers.layer_table(results, measured, "prior_agreement", whole=True),
        has_masks=bool(statistics or drawn),
        agreement=agreement_chart(results, statistics),
        seeds_note=seeds_note(experiment),
        candidates=candidates.candidate_charts(results, statistics),
        positions=candidates.position_charts(results, statistics),
        broad={row for row, frame in statistics.items() if candidates.is_broad(frame)},
        tiles=(drawn[:IN_FRONT], drawn[IN_FRONT:]),
        exports=exports.export_manifests(results),
        losses=losses.losses(results),
        pictures=pictures.read_pictures(results),
        details=[details.row_details(results, row, file) for row in results.records],
    )


def index_page(experiments: Mapping[str, Experiment], reports: Path) -> str:
    """The page that lists all tables."""
    tables = []
    for experiment in experiments.values():
        results = Results(experiment, reports)
        tables.append(
            {
                "results": results,
                "dense": headline.described(results, results.dense) if results.dense in results.measured else None,
                "oneshot": headline.winner(results, ("oneshot",)),
                "learned": headline.winner(results, ("learned",)),
            }
        )
    return _render("tables.html", tables=tables)


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(kinds=KINDS, **values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.globals["own_file"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # styles, scripts
    found.globals["marked"] = lambda *what: attributes(marked(*what))
    return found
