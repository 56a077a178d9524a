"""The mask operation with one logit a position: the relaxed Gumbel top-N, in plain PyTorch.

Every position of a group has a logit and Gumbel noise of its own, θ = (s·l + g)/τ. The mask of the N largest θ is
a draw without replacement (Gumbel top-N: Kool et al. 2019, arXiv 1903.06059). Its relaxation here is the mean of
all masks S of the pattern under p(S) ∝ exp Σ_j S_j θ_j, a stochastic softmax trick (Paulus et al. 2020, arXiv
2006.08063) that tends to that mask as τ → 0. It is the candidate form with logits and noise that are sums over the
positions that a candidate keeps; where N is 1 the two are the same. M numbers a group stand for C(M, N).

p(S) is the distribution of M independent trials with odds exp θ_j, given that N of them succeed, so that sums over
all masks are recursions over positions and successes (Chen, Dempster & Liu 1994, "Weighted finite population sampling
to maximize entropy"). A factor common to all odds cancels; with one that puts the N largest above 1 and the others
below, the condition has a probability of at least 2^−M, and nothing under- or overflows. With A_j and B_j the
chances that the other positions bring N−1 and N successes, and π_j that j brings one,

    m_j = π_j A_j / R,  R = π_j A_j + (1−π_j) B_j,
    ∂L/∂l_j = (s/τ)·m_j (1−m_j)·(E[S·q | S_j=1] − E[S·q | S_j=0]),  q_j = (∂L/∂wm_j + 2·∂L/∂Σ·wm_j)·w_j,

where with straight-through masks wm is the hard masked weight and the rest soft.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from maskllm4v.sparsity.gumbel.eager import energy_dtype, from_rows, noise, spans, to_rows, wide
from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.sparsity.patterns import NMPattern

# Numbers that one recursion over a span of groups writes: more leave the cache of a CPU, fewer are not worth a call.
CPU_NUMBERS = 2**18
CUDA_NUMBERS = 2**26


def forward(
    weight: Tensor, logits: Tensor, candidates: Tensor | None, sampling: Sampling, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`maskllm4v.sparsity.gumbel.eager.forward`, with logits ``[M, G]``; ``candidates`` are not looked at."""
    masked = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    energy = torch.zeros((), dtype=energy_dtype(weight), device=weight.device)
    with torch.inference_mode():  # calls cost less
        for span, theta in _perturbed(logits, sampling):
            mask = _hard_mask(theta, sampling) if sampling.hard else Trials(theta, kept_of(sampling)).mask
            product = to_rows(weight[span]).mul_(mask)
            from_rows(product, masked[span])
            energy += product.square().sum(dtype=energy.dtype)
    return masked, energy


def backward(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor | None,
    sampling: Sampling,
    grad_masked: Tensor,
    grad_energy: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`maskllm4v.sparsity.gumbel.eager.backward`, with logits ``[M, G]``; ``candidates`` are not looked at."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if weight_grad else None
    slope, twice = sampling.scaling / sampling.tau, 2 * grad_energy
    with torch.inference_mode():
        for span, theta in _perturbed(logits, sampling):
            trials = Trials(theta, kept_of(sampling))
            mask = _hard_mask(theta, sampling) if sampling.hard else trials.mask
            w = to_rows(weight[span])
            upstream = torch.addcmul(to_rows(grad_masked[span]), w * mask, twice)
            grad_logits[:, span] = trials.product(w.mul_(upstream)).mul_(slope)
            if grad_weight is not None:
                from_rows(upstream.mul_(mask), grad_weight[span])
    return grad_logits, grad_weight


class Trials:
    """M independent trials with odds exp θ, given that N of them succeed.

    Args:
        theta: ``[M, n]``, a group a column; overwritten.
        kept: N.

    Attributes:
        mask: the chance of each to succeed, ``[M, n]``; sums to N over the positions.
    """

    def __init__(self, theta: Tensor, kept: int) -> None:
        theta.sub_(_threshold(theta, kept))
        # Forwards and backwards at once: [M, 2, 1, n] holds position i and position M−1−i.
        ahead = theta[:, None, None]
        both = torch.cat([ahead, ahead.flip(0)], 1)
        self._on, self._off = both.sigmoid(), both.neg_().sigmoid_()
        self._kept = kept
        # The chances of 0 to N successes before a position, or after it: [M, 2, N+1, n].
        self._chances = torch.empty((len(theta), 2, kept + 1, theta.shape[1]), dtype=theta.dtype, device=theta.device)
        self._chances[0] = 0
        self._chances[0, :, 0] = 1
        for i in range(len(theta) - 1):
            torch.mul(self._chances[i], self._off[i], out=self._chances[i + 1])
            self._chances[i + 1, :, 1:].addcmul_(self._chances[i, :, :-1], self._on[i])
        before, after = self._chances[:, 0], self._facing(self._chances)
        self._fewer = (before[:, :-1] * after[:, 1:]).sum(1)  # A
        self._as_many = (before * after).sum(1)  # B
        on, off = self._on[:, 0, 0], self._off[:, 0, 0]
        won = on * self._fewer
        self._total = torch.addcmul(won, off, self._as_many)  # R, once a position
        self.mask = won / self._total

    def product(self, q: Tensor) -> Tensor:
        """The covariance of each success with Σ q over all of them, ``[M, n]``: ∂(mask · q)/∂θ.

        It is what m (1−m) is multiplied with that cancels: relative to m (1−m), nothing is lost.

        Args:
            q: ``[M, n]``.
        """
        ahead = q[:, None, None]
        both = torch.cat([ahead, ahead.flip(0)], 1)
        sums = torch.zeros_like(self._chances)  # E[Σ q; so many successes] before a position, or after it
        for i in range(len(q) - 1):
            torch.mul(sums[i], self._off[i], out=sums[i + 1])
            gained = torch.addcmul(sums[i, :, :-1], self._chances[i, :, :-1], both[i])
            sums[i + 1, :, 1:].addcmul_(gained, self._on[i])
        chance_before, chance_after = self._chances[:, 0], self._facing(self._chances)
        sum_before, sum_after = sums[:, 0], self._facing(sums)
        fewer = (sum_before[:, :-1] * chance_after[:, 1:]).addcmul_(chance_before[:, :-1], sum_after[:, 1:]).sum(1)
        as_many = (sum_before * chance_after).addcmul_(chance_before, sum_after).sum(1)
        with_it = fewer.addcmul_(q, self._fewer).mul_(self._as_many)
        without = as_many.mul_(self._fewer)
        both_ways = self._on[:, 0, 0] * self._off[:, 0, 0]
        return with_it.sub_(without).mul_(both_ways).div_(self._total).div_(self._total)

    def max_probability(self) -> Tensor:
        """The chance that just the N likeliest succeed, ``[n]``."""
        return torch.maximum(self._on, self._off)[:, 0, 0].prod(0) / self._total[0]

    @staticmethod
    def _facing(x: Tensor) -> Tensor:
        """Of ``[M, 2, N+1, n]``, what stands behind each position, and the count that completes N: ``[M, N+1, n]``."""
        return x[:, 1].flip(0, 1)


def max_probability(theta: Tensor, kept: int) -> Tensor:
    """The chance of the likeliest mask under p(S) ∝ exp Σ_j S_j θ_j, ``[G]``, of θ ``[M, G]``."""
    found = torch.empty(theta.shape[1], dtype=energy_dtype(theta), device=theta.device)
    with torch.inference_mode():
        for span in _spans(theta, kept):
            found[span] = Trials(wide(theta[:, span]).clone(), kept).max_probability()
    return found


def kept_of(sampling: Sampling) -> int:
    """N."""
    assert sampling.kept is not None  # or this backend would not have been chosen
    return sampling.kept


def _perturbed(logits: Tensor, sampling: Sampling) -> Iterator[tuple[slice, Tensor]]:
    """θ = (s·l + g)/τ, ``[M, n]``, of one span after the other."""
    for span in _spans(logits, kept_of(sampling)):
        theta = wide(logits[:, span]) * sampling.scaling
        u = noise(theta, torch.empty(theta.shape, dtype=torch.float32, device="cpu"), span, sampling)
        if u is not None:
            theta.sub_(u.log_().neg_().log_())
        yield span, theta.div_(sampling.tau)


def _threshold(theta: Tensor, kept: int) -> Tensor:
    """Halfway between the N-th and the next largest of each group, ``[n]``."""
    largest: list[Tensor] = []  # the first N + 1; comparing whole rows is cheaper than sorting short columns
    for row in theta:
        for i, other in enumerate(largest):
            largest[i], row = torch.maximum(other, row), torch.minimum(other, row)
        if len(largest) <= kept:
            largest.append(row)
    return (largest[-2] + largest[-1]).div_(2)


def _spans(logits: Tensor, kept: int) -> list[slice]:
    size, groups = logits.shape
    width = (CUDA_NUMBERS if logits.is_cuda else CPU_NUMBERS) // (2 * size * (kept + 1))
    return spans(groups, max(width, 1))


def _hard_mask(theta: Tensor, sampling: Sampling) -> Tensor:
    """The N largest of each group, as zeros and ones ``[M, n]``."""
    return NMPattern(kept_of(sampling), len(theta)).topn_mask(theta.t()).t().to(theta.dtype)
