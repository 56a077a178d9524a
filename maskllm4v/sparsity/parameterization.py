"""What a learned mask's logits stand for: one per candidate mask, or one per position.

A gate knows how many logits a group has, where they start, and which mask they mean; what is drawn from them,
:mod:`maskllm4v.sparsity.gumbel` computes. Logits are ``[K, groups]``, groups in row-major order of the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from maskllm4v.sparsity.gumbel import topn
from maskllm4v.sparsity.patterns import MAX_CANDIDATES, NMPattern
from maskllm4v.utils.errors import ConfigError, PatternError

GATES = ("candidates", "positions")


class MaskParameterization(ABC):
    """How logits become masks of a pattern.

    Attributes:
        pattern: of the masks.
        logits: K, how many a group has.
        kept: N for the mask operation if logits belong to positions, else None.
    """

    logits: int
    kept: int | None = None

    def __init__(self, pattern: NMPattern) -> None:
        self.pattern = pattern

    @abstractmethod
    def candidates(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The mask that each logit stands for, ``[K, M]``; None if logits belong to positions."""

    @abstractmethod
    def mask(self, logits: Tensor, candidates: Tensor | None) -> Tensor:
        """The likeliest mask of each group, boolean ``[groups, M]``; ties go to the lexicographically first.

        Args:
            logits: ``[K, groups]``.
            candidates: what :meth:`candidates` gave.
        """

    @abstractmethod
    def index(self, logits: Tensor) -> Tensor:
        """The candidate index of :meth:`mask`, as :meth:`NMPattern.to_index` gives it, ``[groups]``."""

    @abstractmethod
    def shift(self, mask: Tensor) -> Tensor:
        """Where a prior mask ``[out, in]`` moves the logits, ``[K, groups]``; its mean over all masks is zero."""

    @abstractmethod
    def magnitude(self, weight: Tensor) -> Tensor:
        """½ · the share of each group's Σw² that a logit keeps, ``[K, groups]``; zero groups get equal logits."""

    @abstractmethod
    def max_probability(self, scaled: Tensor) -> Tensor:
        """The chance of the likeliest mask under p(mask) ∝ exp(its logits), ``[groups]``, of scaled logits."""


class CandidateGate(MaskParameterization):
    """A logit a candidate mask: K = C(M, N) (MaskLLM, arXiv 2409.17481).

    Raises:
        PatternError: there are more than 70 candidates.
    """

    def __init__(self, pattern: NMPattern) -> None:
        super().__init__(pattern)
        if pattern.num_candidates > MAX_CANDIDATES:
            raise PatternError(
                f"pattern {pattern} has {pattern.num_candidates} candidate masks a group; with a logit each at most "
                f"{MAX_CANDIDATES} are supported; give each position one with `gate='positions'`"
            )
        self.logits = pattern.num_candidates

    def candidates(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.pattern.candidates(device, dtype)

    def mask(self, logits: Tensor, candidates: Tensor | None) -> Tensor:
        assert candidates is not None
        return candidates[logits.argmax(0)].bool()

    def index(self, logits: Tensor) -> Tensor:
        return logits.argmax(0).to(torch.uint8)

    def shift(self, mask: Tensor) -> Tensor:
        return self.pattern.similarity(mask) - self.pattern.n**2 / self.pattern.m

    def magnitude(self, weight: Tensor) -> Tensor:
        share = _energy_shares(weight, self.pattern.m)
        logits = 0.5 * (self.pattern.candidates(weight.device, torch.float64) @ share).to(logits_dtype(weight))
        # Rounding may tie candidates, or put the magnitude mask just behind another one: it stays ahead.
        best = self.pattern.to_index(self.pattern.topn_mask(weight.abs())).long()[None]
        ahead = _just_above(logits.amax(0, keepdim=True))
        behind = logits.argmax(0, keepdim=True) != best
        return logits.scatter(0, best, torch.where(behind, ahead, logits.gather(0, best)))

    def max_probability(self, scaled: Tensor) -> Tensor:
        return (scaled - scaled.amax(0)).exp().sum(0).reciprocal()  # max softmax = 1 / Σ exp(z − max z)


class PositionGate(MaskParameterization):
    """A logit a position: K = M; a mask's logit is the sum over the positions that it keeps."""

    def __init__(self, pattern: NMPattern) -> None:
        super().__init__(pattern)
        self.logits, self.kept = pattern.m, pattern.n

    def candidates(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def mask(self, logits: Tensor, candidates: Tensor | None = None) -> Tensor:
        return self.pattern.topn_mask(logits.t())

    def index(self, logits: Tensor) -> Tensor:
        return self.pattern.to_index(self.mask(logits))

    def shift(self, mask: Tensor) -> Tensor:
        return mask.reshape(-1, self.pattern.m).t().to(torch.float32) - self.pattern.n / self.pattern.m

    def magnitude(self, weight: Tensor) -> Tensor:
        logits = 0.5 * _energy_shares(weight, self.pattern.m).to(logits_dtype(weight))
        # Rounding may tie a kept position with one before it that is not kept: the magnitude mask stays ahead.
        best = self.pattern.topn_mask(weight.abs()).reshape(-1, self.pattern.m).t()
        ahead = _just_above(logits.masked_fill(best, -torch.inf).amax(0))
        behind = best & (self.mask(logits).t() != best).any(0)
        return torch.where(behind, torch.maximum(logits, ahead), logits)

    def max_probability(self, scaled: Tensor) -> Tensor:
        return topn.max_probability(scaled, self.pattern.n)


def gate_of(name: str, pattern: NMPattern) -> MaskParameterization:
    """The gate of that name. Where one position is kept it is the candidate, so one gate is the other.

    Raises:
        ConfigError: there is no such gate.
    """
    if name not in GATES:
        raise ConfigError(f"gate is {name!r}; allowed: {', '.join(GATES)}")
    return PositionGate(pattern) if name == "positions" and pattern.n > 1 else CandidateGate(pattern)


def logits_dtype(weight: Tensor) -> torch.dtype:
    """Float32 at least, whatever the weight is: 16 bits lose the small steps of an optimiser."""
    return torch.promote_types(weight.dtype, torch.float32)


def _energy_shares(weight: Tensor, m: int) -> Tensor:
    """The share of its group's Σw² that each weight has, ``[M, groups]``, float64; nothing in groups of zeros."""
    groups = weight.detach().reshape(-1, m).double()
    largest = groups.abs().amax(1, keepdim=True)
    energy = (groups / torch.where(largest > 0, largest, 1.0)).square()  # tiny weights do not underflow
    return (energy / energy.sum(1, keepdim=True).clamp_min(1.0)).t()


def _just_above(x: Tensor) -> Tensor:
    above = torch.nextafter(x, torch.full_like(x, torch.inf))
    return above.clamp_min(torch.finfo(x.dtype).tiny)  # where subnormal numbers are taken for zero, too
