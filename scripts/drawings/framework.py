"""The framework: a prior, a learnable mask, frozen weights; what goes forward, what comes back, what is kept."""

from __future__ import annotations

from scripts.drawings.card import BLUE, GREY, INK, LINE, MUTED, ORANGE, PALE, PANEL, Card, shade
from scripts.drawings.example import PATTERN, group

TAU, SCALING = 4.0, 10.0  # as a training of the digits starts
ROW = 31  # pixels from candidate to candidate
TOP = 128  # of the first one


def draw() -> Card:
    """One group of four weights, with real numbers: the first draw of a training."""
    card, example = Card(1000, 480), group()
    probabilities, masks = example.sample(TAU, SCALING, 1)
    p, mask = probabilities[0].tolist(), masks[0].tolist()
    weights, candidates = example.weights.tolist(), PATTERN.candidates().tolist()
    logits = example.logits.tolist()
    best = max(range(len(logits)), key=logits.__getitem__)

    _prior(card, example.prior.tolist())
    _mask(card, candidates, logits, p)
    _weights(card, weights, mask)
    _backward(card)
    _end(card, weights, candidates, best)
    return card


def _heading(card: Card, x: float, y: float, number: str, title: str, about: str) -> None:
    card.dot(x + 11, y, 11, INK)
    card.text(x + 11, y, number, 12, ha="center", color="white", weight="bold")
    card.text(x + 30, y, title, 15, weight="bold")
    card.text(x, y + 18, about, 11.5, color=MUTED, va="top", linespacing=1.25)


def _prior(card: Card, prior: list[bool]) -> None:
    _heading(card, 28, 38, "1", "Prior mask", "one shot: magnitude,\nWanda or SparseGPT")
    rows = ["0110", "1010", "0101", "1100", "0011", "1001", "0110"]
    for number, row in enumerate(rows):
        kept = prior if number == 2 else [cell == "1" for cell in row]
        card.cells(48, 106 + 24 * number, [GREY if cell else "white" for cell in kept], 24)
        if number == 2:
            card.box(45, 103 + 24 * number, 102, 30, fill="none", edge=BLUE, radius=3, line=2.5)
    card.text(96, 292, "keeps two of four", 11.5, ha="center", color=MUTED)


def _mask(card: Card, candidates: list[list[bool]], logits: list[float], p: list[float]) -> None:
    card.box(226, 16, 420, 318, fill=PANEL, edge=LINE)
    _heading(card, 244, 38, "2", "Learnable mask", "six candidates for each group of four weights, a logit each")
    for x, text in ((278, "candidate"), (394, "logit ℓ"), (574, "probability p")):
        card.text(x, 98, text, 12, ha="center", weight="bold")
    for number, (kept, logit, share) in enumerate(zip(candidates, logits, p, strict=True)):
        y = TOP + ROW * number
        card.cells(246, y - 8, [BLUE if cell else "white" for cell in kept], 16)
        card.bar(394 if logit > 0 else 394 + 38 * logit, y - 7, 38 * abs(logit), 14, GREY)
        card.text(354, y, f"{logit:+.2f}".replace("-", "−"), 11.5, ha="right")
        card.bar(538, y - 7, 70 * share, 14, BLUE)
        card.text(538 + 70 * share + 5, y, f"{share:.2f}", 11.5)
    card.bar(393.5, TOP - 14, 1, 5 * ROW + 28, MUTED)
    card.bar(537.5, TOP - 14, 1, 5 * ROW + 28, MUTED)
    middle = TOP + 2.5 * ROW
    card.arrow((440, middle), (530, middle), colour=INK)
    card.text(485, middle - 38, "Gumbel-\nsoftmax", 12, ha="center", linespacing=1.2)
    card.text(485, middle + 22, r"$\mathrm{softmax}\left(\frac{s\ell + g}{\tau}\right)$", 13, ha="center")
    card.text(485, middle + 54, "τ falls,\ns rises", 11.5, ha="center", color=MUTED, linespacing=1.2)
    card.arrow((150, 169), (244, TOP + 4 * ROW), colour=INK)
    card.box(158, 196, 62, 34, fill="white", edge="white")
    card.text(189, 213, "shifts\nthe logits", 11.5, ha="center", color=MUTED, linespacing=1.2)


def _weights(card: Card, weights: list[float], mask: list[float]) -> None:
    _heading(card, 690, 38, "3", "Frozen weights", "the dense model's own, never changed")
    rows = (
        (86, "w", [_signed(w) for w in weights], [GREY] * 4),
        (146, "m", [f"{m:.2f}" for m in mask], [shade(m) for m in mask]),
        (206, "w ⊙ m", [_signed(w * m) for w, m in zip(weights, mask, strict=True)], [PALE] * 4),
    )
    for y, name, texts, fills in rows:
        colours = ["white" if name == "m" and m > 0.65 else INK for m in mask]
        card.cells(736, y, fills, 42, texts, colours)
        card.text(
            726, y + 21, name if name != "w ⊙ m" else "=", 14, ha="right", style="italic" if name in "wm" else "normal"
        )
    card.text(820, 137, "⊙", 14, ha="center")
    card.text(914, 107, "frozen", 12, color=MUTED)
    card.text(914, 167, "soft mask", 12, color=BLUE)
    card.text(914, 227, "used", 12, color=MUTED)
    card.arrow((646, 167), (706, 167), colour=INK)
    card.text(674, 150, r"$\Sigma p_k S_k$", 12, ha="center")
    card.arrow((820, 250), (820, 278), colour=INK)
    card.text(832, 263, "forward", 11.5, color=MUTED)
    card.box(752, 280, 136, 36, fill="white", edge=INK)
    card.text(820, 298, "model → loss", 13, ha="center")


def _backward(card: Card) -> None:
    card.path((820, 317), (820, 356), (394, 356), (394, TOP + 5 * ROW + 20), colour=ORANGE, dashed=True, line=2)
    card.text(607, 345, "backward: the loss moves the logits, and nothing else", 12, ha="center", color=ORANGE)


def _end(card: Card, weights: list[float], candidates: list[list[bool]], best: int) -> None:
    card.box(16, 378, 968, 86, fill=PANEL, edge=LINE)
    _heading(card, 28, 406, "4", "At the end", "the likeliest candidate\nof every group")
    kept = candidates[best]
    card.cells(236, 400, [BLUE if cell else "white" for cell in kept], 42)
    card.text(418, 421, "⊙", 14, ha="center")
    card.cells(436, 400, [GREY] * 4, 42, [_signed(w) for w in weights])
    card.text(618, 421, "=", 14, ha="center")
    folded = [_signed(w) if cell else "0" for w, cell in zip(weights, kept, strict=True)]
    card.cells(634, 400, [GREY if cell else "white" for cell in kept], 42, folded)
    card.text(818, 412, "2:4 sparse weights,", 12.5, weight="bold")
    card.text(818, 431, "as sparse tensor cores run", 11.5, color=MUTED)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
