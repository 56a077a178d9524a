"""Charts of how often each candidate mask is taken, or each position kept where those are too many."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from maskllm4v.reporting.page.frame import Frame
from maskllm4v.reporting.page.masks import counted, has_positions, kept_share
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import Scale, linear_scale
from maskllm4v.reporting.page.svg import Drawing, drawing, marked, tag

WIDTH, HEIGHT = 380.0, 94.0  # of the picture, and of the bars' part of it
MANY, BROAD = 40, 784.0  # from so many candidates on, a picture is so wide
BAR, SQUARE = 26.0, 6.0  # widths at most: of a bar, and of a weight in the mask below it
NUMBER = 12.0  # height of a position's number below it


def is_broad(frame: pd.DataFrame) -> bool:
    """Whether a row's chart is wider than others."""
    return len(counted(frame)) >= MANY


def candidate_charts(results: Results, statistics: dict[str, pd.DataFrame]) -> dict[str, Drawing]:
    """A chart a row, by row; rows of one pattern have one axis. Rows that were counted by position are absent.

    Args:
        results: whose rows they are.
        statistics: from :func:`maskllm4v.reporting.page.masks.read_mask_statistics`.
    """
    return _charts(results, {row: f for row, f in statistics.items() if not has_positions(results, row, f)}, False)


def position_charts(results: Results, statistics: dict[str, pd.DataFrame]) -> dict[str, Drawing]:
    """Charts of the rows that :func:`candidate_charts` leaves out: a bar a position of a group."""
    return _charts(results, {row: f for row, f in statistics.items() if has_positions(results, row, f)}, True)


def _charts(results: Results, statistics: dict[str, pd.DataFrame], positions: bool) -> dict[str, Drawing]:
    shares = {row: _shares(frame) for row, frame in statistics.items()}
    patterns = {row: str(results.lines[row]["pattern"]) for row in shares}
    most: dict[str, float] = {}
    for row, frame in shares.items():
        most[patterns[row]] = max(most.get(patterns[row], 0.0), float(frame["most"].max()))
    scales = {pattern: linear_scale([0.0, 100 * share], count=3) for pattern, share in most.items()}
    return {row: _chart(results, row, frame, scales[patterns[row]], positions) for row, frame in shares.items()}


def _shares(frame: pd.DataFrame) -> pd.DataFrame:
    """By candidate or position: its ``share`` of all groups; ``least`` and ``most`` of any layer (mean over seeds)."""
    names, groups = counted(frame), frame["groups"]
    by_layer = frame.groupby("layer", sort=False)[names].mean()
    share = frame[names].mul(groups, axis=0).sum() / groups.sum()
    return pd.DataFrame({"share": share, "least": by_layer.min(), "most": by_layer.max()})


def _chart(results: Results, row: str, shares: pd.DataFrame, up: Scale, positions: bool) -> Drawing:
    names = [str(name) for name in shares.index]
    width = BROAD if len(names) >= MANY else WIDTH
    frame = Frame(40, 8, width - 8, 8 + HEIGHT, linear_scale([0, 1]), up)
    step = (frame.right - frame.left) / len(names)
    bar = min(BAR, step * 0.7)
    square = min(SQUARE, bar)
    middles = {name: frame.left + step * (place + 0.5) for place, name in enumerate(names)}
    if positions:
        title, even, height = "Positions that masks keep", 100 * kept_share(results, row), NUMBER
        about = (
            "A bar a position of a group: the share of groups that keep it in percent, a line from the least to the "
            "most of any layer; dashed: all positions alike."
        )
        below = [_numbers(list(middles.values()), frame.bottom + 16)]
    else:
        title, even, height = "Candidate masks", 100 / len(names), len(names[0]) * (square + 1)
        about = (
            "A bar a candidate: its share of all groups in percent, a line from the least to the most of any layer; "
            "dashed: all candidates alike. Below, each candidate from top to bottom, kept weights filled."
        )
        below = [tag("path", d=_bits(middles, bit, frame.bottom + 6, square), class_=f"bit-{bit}") for bit in "01"]
    bars = [
        _bar(row, place, share, frame, middles[str(share.Index)], bar, positions)
        for place, share in enumerate(shares.itertuples(), 1)
    ]
    uniform = tag("title", f"uniform: {even:.1f} %")
    return drawing(
        f"{title} of {results.labels[row]}",
        about,
        width,
        frame.bottom + 8 + height,
        frame.levels(" %"),
        *bars,
        tag("path", uniform, d=f"M{frame.left:.1f} {frame.y(even):.1f}H{frame.right:.1f}", class_="chance"),
        *below,
        name=f"candidates {'positions ' if positions else ''}k-{results.kind(row)}",
    )


def _bar(row: str, place: int, share: Any, frame: Frame, x: float, width: float, positions: bool) -> Markup:
    """One bar; ``place``: which it is, from 1."""
    y, low, high = (frame.y(100 * float(value)) for value in (share.share, share.least, share.most))
    called = f"position {place}" if positions else str(share.Index)
    about = (
        f"{called}: {100 * share.share:.1f} % of groups, in layers {100 * share.least:.1f} to {100 * share.most:.1f} %"
    )
    what = {"data_position": place} if positions else {"data_candidate": called}
    shows = {**marked(row, "positions" if positions else "candidates"), **what}
    return tag(
        "g",
        tag("title", about, **shows),
        tag("rect", x=x - width / 2, y=y, width=width, height=frame.bottom - y, class_="bar", **shows),
        tag("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_="spread", **shows),
    )


def _numbers(middles: list[float], y: float) -> Markup:
    """Numbers of positions, from 1."""
    texts = [tag("text", str(place), x=x, y=y, text_anchor="middle") for place, x in enumerate(middles, 1)]
    return tag("g", *texts, class_="ticks")


def _bits(middles: dict[str, float], wanted: str, top: float, size: float) -> str:
    """Squares of all kept weights (``1``) or of all pruned ones (``0``), each candidate from top to bottom."""
    return "".join(
        f"M{x - size / 2:.1f} {top + place * (size + 1):.1f}h{size:.1f}v{size:.1f}h-{size:.1f}z"
        for name, x in middles.items()
        for place, bit in enumerate(name)
        if bit == wanted
    )
