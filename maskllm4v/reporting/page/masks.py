"""Pictures of masks: how seeds agree, how often each candidate is taken, and a weight before and after."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from maskllm4v.layout import mask_statistics_file
from maskllm4v.reporting.page.frame import Frame
from maskllm4v.reporting.page.layers import read_diagnostics
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import linear
from maskllm4v.reporting.page.svg import drawing, marked, tag

WIDTH = 480.0
LINE = 31.0
FREQUENCY = (380.0, 150.0)  # pixels of a chart of candidates
MANY, BROAD = 40, 784.0  # from so many candidates on, a chart is so wide
PLAIN = ("row", "seed", "layer", "groups", "seed_agreement")  # columns that are no candidates


def read_mask_statistics(results: Results) -> dict[str, pd.DataFrame]:
    """What was counted of each row's masks: a line a seed and layer; rows without masks are absent."""
    table = results.experiment.table
    found = {}
    for row in results.records:
        frame = read_diagnostics({row: mask_statistics_file(table, row, results.reports)})
        if len(frame):
            found[row] = frame
    return found


def candidates(frame: pd.DataFrame) -> list[str]:
    """A row's candidate masks by their bits, in the pattern's order."""
    return [str(column) for column in frame.columns if column not in PLAIN]


@dataclass(frozen=True)
class Agreement:
    """Of one row: how seeds agree in each layer, and how they would by chance."""

    row: str
    by_layer: dict[str, float]
    chance: float


def seed_agreement(statistics: dict[str, pd.DataFrame]) -> list[Agreement]:
    """Means over seeds; rows of one seed are absent."""
    found = []
    for row, frame in statistics.items():
        known = frame.dropna(subset=["seed_agreement"])
        if len(known):
            means = known.groupby("layer", sort=False)["seed_agreement"].mean()
            by_layer = {str(layer): float(value) for layer, value in means.items()}
            found.append(Agreement(row, by_layer, 1 / len(candidates(frame))))
    return found


def agreement_chart(results: Results, agreements: list[Agreement]) -> Markup | None:
    """A line a row, a dot a layer, a tick at the mean and one at chance."""
    if not agreements:
        return None
    frame = Frame(8, 0, WIDTH - 46, 6 + LINE * len(agreements), linear([0.0, 1.0]))
    lines = []
    for place, found in enumerate(agreements):
        top = 4 + LINE * place
        middle, chance = top + 20, frame.x(found.chance)
        mean = sum(found.by_layer.values()) / len(found.by_layer)
        shows = marked(found.row, "seed_agreement")
        marks = [
            tag("text", f"{results.numbers[found.row]}", x=frame.left, y=top + 11, class_="number"),
            tag("text", results.labels[found.row], x=frame.left + 23, y=top + 11, class_="name"),
            tag("text", f"{mean:.2f}", x=WIDTH, y=middle + 4.5, text_anchor="end", class_="value", **shows),
            tag(
                "path",
                tag("title", f"chance: {found.chance:.3f}"),
                d=f"M{chance:.1f} {middle - 6:.1f}v12",
                class_="chance",
            ),
        ]
        for layer, value in found.by_layer.items():
            about = tag("title", f"{layer}: {value:.4f}")
            marks.append(tag("circle", about, cx=frame.x(value), cy=middle, r=3, **shows, data_layer=layer))
        marks.append(tag("path", d=f"M{frame.x(mean):.1f} {middle - 5:.1f}v10", class_="mean", **shows))
        lines.append(tag("g", *marks, class_=f"k-{results.kind(found.row)}"))
    return drawing(
        "Agreement between seeds by layer",
        "A line a row, a dot a layer: the share of groups with the same mask in another seed; dashed ticks: chance.",
        WIDTH,
        frame.bottom + 42,
        frame.axes("share of groups with the same mask in another seed"),
        *lines,
        name="agreement",
    )


def candidate_charts(results: Results, statistics: dict[str, pd.DataFrame]) -> dict[str, Markup]:
    """A chart a row, by row; rows of one pattern have one axis."""
    tops: dict[str, float] = {}
    found = {}
    for row, frame in statistics.items():
        shares = _shares(frame)
        found[row] = shares
        pattern = str(results.lines[row]["pattern"])
        tops[pattern] = max(tops.get(pattern, 0.0), float(shares["most"].max()))
    return {
        row: _candidate_chart(results, row, shares, tops[str(results.lines[row]["pattern"])])
        for row, shares in found.items()
    }


def _shares(frame: pd.DataFrame) -> pd.DataFrame:
    """By candidate: its ``share`` of all groups, and the ``least`` and ``most`` of any layer (mean over seeds)."""
    names, groups = candidates(frame), frame["groups"]
    by_layer = frame.groupby("layer", sort=False)[names].mean()
    share = frame[names].mul(groups, axis=0).sum() / groups.sum()
    return pd.DataFrame({"share": share, "least": by_layer.min(), "most": by_layer.max()})


def _candidate_chart(results: Results, row: str, shares: pd.DataFrame, most: float) -> Markup:
    width, height = (BROAD if len(shares) >= MANY else FREQUENCY[0]), FREQUENCY[1]
    m = len(str(shares.index[0]))
    frame = Frame(40, 8, width - 8, height - 8 * m, linear([0, 1]), linear([0.0, 100 * most], count=3))
    step = (frame.right - frame.left) / len(shares)
    bar = min(26.0, step * 0.7)
    size = min(6.0, bar)
    marks: list[Markup] = []
    kept: list[str] = []
    dropped: list[str] = []
    for place, (name, least, share, most_of) in enumerate(
        zip(shares.index, shares["least"], shares["share"], shares["most"], strict=True)
    ):
        x = frame.left + step * (place + 0.5)
        y, low, high = (frame.y(100 * float(value)) for value in (share, least, most_of))
        shows = {**marked(row, "candidates"), "data_candidate": str(name)}
        about = f"{name}: {100 * share:.1f} % of groups, in layers {100 * least:.1f} to {100 * most_of:.1f} %"
        box = tag("rect", x=x - bar / 2, y=y, width=bar, height=frame.bottom - y, class_="bar", **shows)
        spread = tag("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_="spread", **shows)
        marks.append(tag("g", tag("title", about, **shows), box, spread))
        for bit, value in enumerate(str(name)):
            square = f"M{x - size / 2:.1f} {frame.bottom + 6 + bit * (size + 1):.1f}h{size:.1f}v{size:.1f}h-{size:.1f}z"
            (kept if value == "1" else dropped).append(square)
    uniform = frame.y(100 / len(shares))
    level = tag("title", f"uniform: {100 / len(shares):.1f} %")
    return drawing(
        f"Candidate masks of {results.labels[row]}",
        "A bar a candidate: its share of all groups in percent, a line from the least to the most of any layer; "
        "dashed: all candidates alike. Below, each candidate from top to bottom, kept weights filled.",
        width,
        frame.bottom + 8 + m * (size + 1),
        frame.levels(" %"),
        *marks,
        tag("path", level, d=f"M{frame.left:.1f} {uniform:.1f}H{frame.right:.1f}", class_="chance"),
        tag("path", d="".join(dropped), class_="bit-off"),
        tag("path", d="".join(kept), class_="bit-on"),
        name=f"candidates k-{results.kind(row)}",
    )
