"""The hot operation: logits and Gumbel noise in, softly masked weights out.

For each group of M weights with logits l, scaling s, temperature τ and Gumbel noise g,
p = softmax((s·l + g)/τ) mixes the K candidate masks S into a soft mask m = Sᵀp (MaskLLM,
arXiv 2409.17481, Eq. 5-7). Forward gives w ⊙ m and Σ(w ⊙ m)²; backward is in closed form,

    q_j = (∂L/∂wm_j + 2·∂L/∂Σ·wm_j)·w_j,   t_k = Σ_j S_kj q_j,   ∂L/∂l_k = (s/τ)·p_k·(t_k − Σ_i p_i t_i),

worked through in chunks of groups that stay in cache. For 2:4 both Sᵀp and t are written out: candidate
k and 5−k are complements, so three differences of probabilities give all four mask values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.randomness import CHUNK, uniforms


def masked_weight(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor,
    *,
    tau: float,
    scaling: float,
    hard: bool = False,
    uniform: Tensor | None = None,
    key: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a mask for every group and apply it.

    Args:
        weight: ``[out, in]``, frozen or not.
        logits: ``[K, groups]``; groups in row-major order of the weight.
        candidates: ``[K, M]`` of zeros and ones in the weight's dtype, lexicographic order.
        tau: temperature τ > 0.
        scaling: s, the factor on the logits.
        hard: use the arg-max candidate forward and the soft gradient backward (straight-through).
        uniform: noise in (0, 1), ``[K, groups]``; for tests and replays.
        key: Philox key to draw the noise with, if ``uniform`` is not given. With neither there is no noise.

    Returns:
        The masked weight ``[out, in]`` and the sum of its squares (scalar), both differentiable with
        respect to ``logits``, and ``weight`` if it asks for a gradient.
    """
    return _MaskedWeight.apply(weight, logits, candidates, tau, scaling, hard, uniform, key)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        logits: Tensor,
        candidates: Tensor,
        tau: float,
        scaling: float,
        hard: bool,
        uniform: Tensor | None,
        key: np.ndarray | None,
    ) -> tuple[Tensor, Tensor]:
        w = weight.reshape(-1, candidates.shape[1])  # [G, M]
        masked = torch.empty_like(w)
        probabilities = torch.empty_like(logits)  # [K, G]
        energy = torch.zeros((), dtype=masked.dtype, device=masked.device)
        for chunk, span in _chunks(w.shape[0]):
            p = logits[:, span] * scaling
            noise = _noise(p, chunk, span, uniform, key)
            if noise is not None:
                p.sub_(noise.log_().neg_().log_())  # + Gumbel: −log(−log u)
            p.div_(tau)
            p.sub_(p.amax(0)).exp_()
            p.div_(p.sum(0))
            probabilities[:, span] = p
            part = masked[span]
            torch.mul(w[span], _mask(p, candidates, hard), out=part)
            energy += part.square().sum()
        masked = masked.view_as(weight)
        ctx.save_for_backward(weight, masked, probabilities, candidates)
        ctx.slope, ctx.hard = scaling / tau, hard
        return masked, energy

    @staticmethod
    def backward(ctx: Any, grad_masked: Tensor, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
        weight, masked, probabilities, candidates = ctx.saved_tensors
        width = candidates.shape[1]
        w, wm = weight.reshape(-1, width), masked.reshape(-1, width)
        g = grad_masked.reshape(-1, width)
        grad_logits = torch.empty_like(probabilities)
        grad_weight = torch.empty_like(w) if ctx.needs_input_grad[0] else None
        for _, span in _chunks(w.shape[0]):
            p = probabilities[:, span]
            upstream = torch.addcmul(g[span], wm[span], 2 * grad_energy)
            if grad_weight is not None:
                torch.mul(upstream, _mask(p, candidates, ctx.hard), out=grad_weight[span])
            t = _candidate_sums(upstream * w[span], candidates)  # [K, chunk]
            torch.mul(t.sub_((p * t).sum(0)), p, out=grad_logits[:, span])
        grad_logits.mul_(ctx.slope)
        if grad_weight is not None:
            grad_weight = grad_weight.view_as(weight)
        return grad_weight, grad_logits, None, None, None, None, None, None


def _chunks(groups: int) -> list[tuple[int, slice]]:
    return [(i, slice(a, min(a + CHUNK, groups))) for i, a in enumerate(range(0, groups, CHUNK))]


def _noise(like: Tensor, chunk: int, span: slice, uniform: Tensor | None, key: np.ndarray | None) -> Tensor | None:
    """A fresh tensor of uniforms for one chunk, or None."""
    if uniform is not None:
        return uniform[:, span].to(like, copy=True)
    if key is not None:
        return uniforms(key, chunk, *like.shape).to(like)
    return None


def _mask(p: Tensor, candidates: Tensor, hard: bool) -> Tensor:
    """Soft or arg-max mask ``[chunk, M]`` of probabilities ``[K, chunk]``."""
    if hard:
        return candidates[p.argmax(0)]
    if candidates.shape == (6, 4):  # 2:4
        d0, d1, d2 = (p[:3] - p[3:].flip(0)).unbind(0)  # complements: k and 5 − k
        both, rest = d1 + d2, d1 - d2
        up, down = 1 + d0, 1 - d0
        return torch.stack((up + both, up - both, down + rest, down - rest), 1).mul_(0.5)
    with torch.autocast(p.device.type, enabled=False):
        return p.t() @ candidates


def _candidate_sums(q: Tensor, candidates: Tensor) -> Tensor:
    """t_k = Σ_j S_kj q_j, ``[K, chunk]``, of q ``[chunk, M]``."""
    if candidates.shape == (6, 4):
        a, b, c, d = q.t().contiguous().unbind(0)
        return torch.stack((a + b, a + c, a + d, b + c, b + d, c + d))
    with torch.autocast(q.device.type, enabled=False):
        return candidates @ q.t()
