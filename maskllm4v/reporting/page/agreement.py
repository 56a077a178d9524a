"""The chart of how masks of several seeds agree, layer by layer."""

from __future__ import annotations

import pandas as pd
from markupsafe import Markup

from maskllm4v.config import Experiment
from maskllm4v.reporting.page.frame import Frame
from maskllm4v.reporting.page.masks import candidate_count
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import linear_scale
from maskllm4v.reporting.page.stack import Place, heading, stacked
from maskllm4v.reporting.page.svg import Drawing, drawing, marked, tag

METRIC = "seed_agreement"
WIDTH, VALUE = 480.0, 46.0  # pixels of the chart, and of the numbers at its right
HEIGHT, GAP = 10.0, 6.0  # of a row's dots, and below them


def agreement_chart(results: Results, statistics: dict[str, pd.DataFrame]) -> Drawing | None:
    """A line a row, a dot a layer, a tick at the mean and one at chance; None where there is one seed.

    Args:
        results: whose rows they are.
        statistics: from :func:`maskllm4v.reporting.page.masks.read_mask_statistics`.
    """
    known = {row: frame.dropna(subset=[METRIC]) for row, frame in statistics.items()}
    places = stacked(results, [row for row, frame in known.items() if len(frame)], HEIGHT, GAP)
    if not places:
        return None
    frame = Frame(12, 0, WIDTH - VALUE, places[-1].lower + GAP, linear_scale([0.0, 1.0]))
    return drawing(
        "Agreement between seeds by layer",
        "A line a row, a dot a layer: the share of groups with the same mask in another seed; dashed ticks: chance.",
        WIDTH,
        frame.bottom + 42,
        frame.axes("share of groups with the same mask in another seed"),
        *(_line(results, place, known[place.row], frame) for place in places),
        name="agreement",
    )


def seeds_note(experiment: Experiment) -> str:
    """What agreement can be expected."""
    if len({experiment.dense_seed(seed) for seed in experiment.seeds}) > 1:
        return "Every seed has a dense model of its own, so its masks have nothing in common but chance."
    return "All seeds share one dense model."


def _line(results: Results, place: Place, known: pd.DataFrame, frame: Frame) -> Markup:
    by_layer = known.groupby("layer", sort=False)[METRIC].mean()  # over seeds
    mean, chance = float(by_layer.mean()), 1 / candidate_count(results, place.row)
    shows, middle = marked(place.row, METRIC), place.middle
    dots = [
        tag(
            "circle",
            tag("title", f"{layer}: {value:.4f}"),
            cx=frame.x(value),
            cy=middle,
            r=3,
            **shows,
            data_layer=layer,
        )
        for layer, value in by_layer.items()
    ]
    by_chance = tag("title", f"chance: {chance:.3f}" if chance >= 0.001 else f"chance: {chance:.6f}")
    return tag(
        "g",
        heading(results, place, frame.left),
        tag("text", f"{mean:.2f}", x=WIDTH, y=middle + 4.5, text_anchor="end", class_="value", **shows),
        tag("path", by_chance, d=f"M{frame.x(chance):.1f} {middle - 6:.1f}v12", class_="chance"),
        *dots,
        tag("path", d=f"M{frame.x(mean):.1f} {middle - 5:.1f}v10", class_="mean", **shows),
        class_=f"k-{results.kind(place.row)}",
    )
