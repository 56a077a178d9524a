"""Charts of how often each candidate mask is taken."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from maskllm4v.reporting.page.frame import Frame
from maskllm4v.reporting.page.masks import candidates
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import Scale, linear
from maskllm4v.reporting.page.svg import drawing, marked, tag

WIDTH, HEIGHT = 380.0, 94.0  # of the picture, and of the bars' part of it
MANY, BROAD = 40, 784.0  # from so many candidates on, a picture is so wide
BAR, SQUARE = 26.0, 6.0  # widths at most: of a bar, and of a weight in the mask below it


def is_broad(frame: pd.DataFrame) -> bool:
    """Whether a row's chart is wider than others."""
    return len(candidates(frame)) >= MANY


def candidate_charts(results: Results, statistics: dict[str, pd.DataFrame]) -> dict[str, Markup]:
    """A chart a row, by row; rows of one pattern have one axis.

    Args:
        results: whose rows they are.
        statistics: from :func:`maskllm4v.reporting.page.masks.read_mask_statistics`.
    """
    shares = {row: _shares(frame) for row, frame in statistics.items()}
    patterns = {row: str(results.lines[row]["pattern"]) for row in shares}
    most: dict[str, float] = {}
    for row, frame in shares.items():
        most[patterns[row]] = max(most.get(patterns[row], 0.0), float(frame["most"].max()))
    scales = {pattern: linear([0.0, 100 * share], count=3) for pattern, share in most.items()}
    return {row: _chart(results, row, frame, scales[patterns[row]]) for row, frame in shares.items()}


def _shares(frame: pd.DataFrame) -> pd.DataFrame:
    """By candidate: its ``share`` of all groups, and the ``least`` and ``most`` of any layer (mean over seeds)."""
    names, groups = candidates(frame), frame["groups"]
    by_layer = frame.groupby("layer", sort=False)[names].mean()
    share = frame[names].mul(groups, axis=0).sum() / groups.sum()
    return pd.DataFrame({"share": share, "least": by_layer.min(), "most": by_layer.max()})


def _chart(results: Results, row: str, shares: pd.DataFrame, up: Scale) -> Markup:
    names = [str(name) for name in shares.index]
    width = BROAD if len(names) >= MANY else WIDTH
    frame = Frame(40, 8, width - 8, 8 + HEIGHT, linear([0, 1]), up)
    step = (frame.right - frame.left) / len(names)
    bar = min(BAR, step * 0.7)
    square = min(SQUARE, bar)
    middles = {name: frame.left + step * (place + 0.5) for place, name in enumerate(names)}
    bars = [_bar(row, str(share.Index), share, frame, middles[str(share.Index)], bar) for share in shares.itertuples()]
    chance = 100 / len(names)
    uniform = tag("title", f"uniform: {chance:.1f} %")
    return drawing(
        f"Candidate masks of {results.labels[row]}",
        "A bar a candidate: its share of all groups in percent, a line from the least to the most of any layer; "
        "dashed: all candidates alike. Below, each candidate from top to bottom, kept weights filled.",
        width,
        frame.bottom + 8 + len(names[0]) * (square + 1),
        frame.levels(" %"),
        *bars,
        tag("path", uniform, d=f"M{frame.left:.1f} {frame.y(chance):.1f}H{frame.right:.1f}", class_="chance"),
        *(tag("path", d=_bits(middles, bit, frame.bottom + 6, square), class_=f"bit-{bit}") for bit in "01"),
        name=f"candidates k-{results.kind(row)}",
    )


def _bar(row: str, name: str, share: Any, frame: Frame, x: float, width: float) -> Markup:
    y, low, high = (frame.y(100 * float(value)) for value in (share.share, share.least, share.most))
    about = (
        f"{name}: {100 * share.share:.1f} % of groups, in layers {100 * share.least:.1f} to {100 * share.most:.1f} %"
    )
    shows = {**marked(row, "candidates"), "data_candidate": name}
    return tag(
        "g",
        tag("title", about, **shows),
        tag("rect", x=x - width / 2, y=y, width=width, height=frame.bottom - y, class_="bar", **shows),
        tag("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_="spread", **shows),
    )


def _bits(middles: dict[str, float], wanted: str, top: float, size: float) -> str:
    """Squares of all kept weights (``1``) or of all pruned ones (``0``), each candidate from top to bottom."""
    return "".join(
        f"M{x - size / 2:.1f} {top + place * (size + 1):.1f}h{size:.1f}v{size:.1f}h-{size:.1f}z"
        for name, x in middles.items()
        for place, bit in enumerate(name)
        if bit == wanted
    )
