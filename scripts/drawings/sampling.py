"""Gumbel-softmax sampling as the temperature falls: real draws for one group of four weights."""

from __future__ import annotations

from maskllm4v.config import PARAMS, load_experiment
from maskllm4v.training.schedule import lerp
from scripts.drawings.card import BLUE, INK, LINE, MUTED, Card, shade
from scripts.drawings.example import PATTERN, group

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a training
DRAWS = 12
CELL = 15
LEFT, STEP, TOP = 62, 188, 206  # of the first block, from block to block


def draw() -> Card:
    """Each line a draw: probabilities of the six candidates, and the soft mask that they make."""
    card, example = Card(1000, 512), group()
    learning = load_experiment(PARAMS).learning
    card.text(24, 32, "Gumbel-softmax sampling as the temperature falls", 16, weight="bold")
    about = (
        "One group of four weights, its logits held still. Each line is a draw, the same noise from left to right:",
        "the probabilities of the six candidates, and the soft mask of the four weights that they add up to.",
    )
    for number, line in enumerate(about):
        card.text(24, 57 + 18 * number, line, 12, color=MUTED)
    card.text(36, TOP + DRAWS * CELL / 2, f"{DRAWS} draws", 12, ha="center", va="center", rotation=90, color=MUTED)
    for number, share in enumerate(POINTS):
        tau, scaling = lerp(*learning.tau, share), lerp(*learning.scaling, share)
        x = LEFT + STEP * number
        when = {0.0: "first step", 1.0: "last step"}.get(share, f"{100 * share:.0f} % of the steps")
        card.text(x, 110, when, 13, weight="bold")
        card.text(x, 130, f"τ = {tau:.3g},  s = {scaling:.3g}", 12)
        probabilities, masks = example.sample(tau, scaling, DRAWS)
        _block(card, x, probabilities.tolist())
        _block(card, x + 7 * CELL, masks.tolist())
        _icons(card, x)
        largest = float(probabilities.max(1).values.mean())
        card.text(x, TOP + DRAWS * CELL + 18, f"largest p: {largest:.2f} on average", 11.5, color=MUTED)
    _schedule(card, learning.tau, learning.scaling)
    _scale(card)
    return card


def _block(card: Card, x: float, values: list[list[float]]) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            card.bar(x + column * CELL, TOP + row * CELL, CELL, CELL, shade(value), edge=LINE)


def _icons(card: Card, x: float) -> None:
    """Above each column which weights it stands for."""
    for column, kept in enumerate(PATTERN.candidates().tolist()):
        for weight, cell in enumerate(kept):
            card.bar(x + column * CELL + 3.5, TOP - 40 + 8.5 * weight, 8, 8, INK if cell else "white", edge=MUTED)
    for weight in range(4):
        card.text(x + (7.5 + weight) * CELL, TOP - 11, f"{weight + 1}", 11, ha="center", color=MUTED)
    card.text(x, TOP - 52, "candidates", 11, color=MUTED)
    card.text(x + 7 * CELL, TOP - 52, "soft mask", 11, color=MUTED)


def _schedule(card: Card, tau: tuple[float, float], scaling: tuple[float, float]) -> None:
    first, last, low, high = LEFT + 80, LEFT + 4 * STEP + 80, 484, 434
    for name, values, colour, ends in (("τ", tau, BLUE, (high, low)), ("s", scaling, MUTED, (low, high))):
        card.axes.plot((first, last), ends, color=colour, linewidth=1.5)
        for share in POINTS:
            card.axes.plot(first + share * (last - first), lerp(*ends, share), "o", color=colour, markersize=4)
        card.text(first - 12, ends[0], f"{name} = {values[0]:g}", 12, ha="right", color=colour)
        card.text(last + 12, ends[1], f"{name} = {values[1]:g}", 12, color=colour)


def _scale(card: Card) -> None:
    for step in range(20):
        card.bar(850 + 5 * step, 24, 5, 12, shade(step / 19), edge=shade(step / 19))
    card.text(842, 30, "0", 11.5, ha="right", color=MUTED)
    card.text(958, 30, "1", 11.5, color=MUTED)
