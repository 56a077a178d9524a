"""What a draw of masks depends on besides logits and weights: the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How masks are drawn.

    Attributes:
        tau: temperature τ > 0.
        scaling: s, the factor on the logits.
        hard: arg-max mask forward, soft gradient backward (straight-through).
        key: Philox key of the noise (:func:`maskllm4v.randomness.philox_key`), two unsigned 64-bit integers.
        uniform: noise in (0, 1), ``[K, groups]``, in place of drawn noise. With neither there is none.
        kept: N, where there is a logit a position (M of them, and as many numbers of noise) instead of a candidate.
    """

    tau: float
    scaling: float
    hard: bool = False
    key: tuple[int, int] | None = None
    uniform: Tensor | None = None
    kept: int | None = None
