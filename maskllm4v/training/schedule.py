"""Learning rate, temperature and scaling as functions of the progress of a run."""

from __future__ import annotations

import math
from typing import Literal


def progress(step: int, steps: int, steps_per_epoch: int, anneal: Literal["step", "epoch"]) -> float:
    """How far a run is, from 0 at the first step (or epoch) to 1 at the last.

    ``"epoch"`` moves once an epoch, as the vision original does; in a run of one epoch nothing moves.
    """
    if anneal == "step":
        return step / max(steps - 1, 1)
    epochs = math.ceil(steps / steps_per_epoch)
    return (step // steps_per_epoch) / max(epochs - 1, 1)


def lerp(first: float, last: float, fraction: float) -> float:
    """From ``first`` to ``last`` in a straight line."""
    return first * (1 - fraction) + last * fraction  # exact at both ends


def cosine(first: float, last: float, fraction: float) -> float:
    """From ``first`` to ``last`` along half a cosine (Loshchilov & Hutter 2017)."""
    return lerp(last, first, 0.5 * (1 + math.cos(math.pi * fraction)))


def warm_up(step: int, steps: int) -> float:
    """Factor on the learning rate: linear over the first ``steps`` steps, 1 from then on."""
    return min(1.0, (step + 1) / steps) if steps else 1.0
