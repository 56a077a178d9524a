"""What a draw of masks depends on besides logits and weights: the same for every backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Key = tuple[int, int]  # of Philox (:func:`maskllm4v.utils.rng.philox_key`): two unsigned 64-bit integers


@dataclass(frozen=True)
class Sampling:
    """How masks are drawn.

    Attributes:
        tau: temperature τ > 0.
        scaling: s, the factor on the logits.
        hard: arg-max mask forward, soft gradient backward (straight-through).
        key: of the noise.
        uniform: noise in (0, 1), ``[K, groups]``, in place of drawn noise. With neither there is none.
        kept: N, where logits belong to positions (M of them, and as many numbers of noise) instead of candidates.
        joined: several layers side by side along the groups, each with its number of groups and its key; in place of
            ``key``. Each gets the noise that it would get alone.
    """

    tau: float
    scaling: float
    hard: bool = False
    key: Key | None = None
    uniform: Tensor | None = None
    kept: int | None = None
    joined: tuple[tuple[int, Key], ...] = ()

    @property
    def draws(self) -> bool:
        """Whether noise is drawn."""
        return self.uniform is None and (self.key is not None or bool(self.joined))

    def parts(self, span: slice) -> Iterator[tuple[slice, Key, int]]:
        """A span of groups layer by layer: which part of the span, the layer's key, and its group that comes first."""
        if self.key is not None:
            yield slice(0, span.stop - span.start), self.key, span.start
        start = 0
        for groups, key in self.joined:
            first, stop = max(span.start, start), min(span.stop, start + groups)
            if first < stop:
                yield slice(first - span.start, stop - span.start), key, first - start
            start += groups
