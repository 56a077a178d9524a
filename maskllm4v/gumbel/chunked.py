"""The mask operation in plain PyTorch, in spans of groups that stay in cache: any pattern, any device.

Tensors are held with groups along the last axis, ``[K, n]`` and ``[M, n]``: reductions over a last axis
of 4 or 6 cost many times as much. Noise is drawn again in backward, so that nothing has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from maskllm4v.gumbel.sampling import Sampling
from maskllm4v.randomness import CHUNK, fill_uniforms

CUDA_SPAN = 64 * CHUNK  # there is no cache to stay in, and every launch costs


def forward(
    weight: Tensor, logits: Tensor, candidates: Tensor, sampling: Sampling, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Masked weight ``[G, M]`` in ``dtype``, and Σ(masked weight)² of its unrounded values.

    Args:
        weight: ``[G, M]``.
        logits: ``[K, G]``.
        candidates: ``[K, M]``, in the weight's dtype.
        sampling: how masks are drawn.
        dtype: of the masked weight.
    """
    masked = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    energy = torch.zeros((), dtype=energy_dtype(weight), device=weight.device)
    for span, p in _probabilities(logits, sampling):
        product = masked[span] if dtype == weight.dtype else torch.empty_like(weight[span])
        apply_mask(weight[span], p, candidates, sampling.hard, out=product)
        if dtype != weight.dtype:
            masked[span] = product
        for part in product.split(CHUNK):
            energy += part.square().sum(dtype=energy.dtype)
    return masked, energy


def backward(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor,
    sampling: Sampling,
    grad_masked: Tensor,
    grad_energy: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients by logits ``[K, G]`` and, if asked for, weight ``[G, M]``.

    Args:
        weight, logits, candidates, sampling: as in :func:`forward`.
        grad_masked: ``[G, M]``.
        grad_energy: scalar, on the weight's device.
        weight_grad: whether the weight gets a gradient.
    """
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if weight_grad else None
    slope, twice = sampling.scaling / sampling.tau, 2 * grad_energy
    for span, p in _probabilities(logits, sampling):
        w = weight[span]
        wm = apply_mask(w, p, candidates, sampling.hard)
        upstream = torch.addcmul(grad_masked[span], wm, twice, out=wm)
        if grad_weight is not None:
            apply_mask(upstream, p, candidates, sampling.hard, out=grad_weight[span])
        t = _candidate_sums(upstream, w, candidates)  # [K, n]
        torch.mul(t.sub_((p * t).sum(0)), p, out=grad_logits[:, span]).mul_(slope)
    return grad_logits, grad_weight


def energy_dtype(weight: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def spans(logits: Tensor) -> list[slice]:
    """Slices of whole chunks of noise: one a thread on a CPU."""
    width = CUDA_SPAN if logits.is_cuda else CHUNK * torch.get_num_threads()
    return [slice(a, min(a + width, logits.shape[1])) for a in range(0, logits.shape[1], width)]


def _probabilities(logits: Tensor, sampling: Sampling) -> Iterator[tuple[slice, Tensor]]:
    """p = softmax((s·l + g)/τ), ``[K, n]``, with g = −log(−log u), of one span after the other.

    All share their memory, so that it stays in cache.
    """
    p = row = noise = torch.empty(0)
    for span in spans(logits):
        part = logits[:, span]
        if p.shape != part.shape:
            p, row, noise = torch.empty_like(part), torch.empty_like(part[0]), torch.empty(part.shape)
        torch.mul(part, sampling.scaling, out=p)
        u = _noise(p, noise, span, sampling)
        if u is not None and sampling.tau == 1:  # exp(s·l + g) = exp(s·l)/E with E = −log u: a logarithm less
            _exp_(p, row).div_(u.log_().neg_())
        else:
            if u is not None:
                p.sub_(u.log_().neg_().log_())
            _exp_(p.div_(sampling.tau), row)
        yield span, p.div_(torch.sum(p, 0, out=row))


def _exp_(z: Tensor, row: Tensor) -> Tensor:
    """exp(z − max z) in place."""
    return z.sub_(torch.amax(z, 0, out=row)).exp_()


def _noise(like: Tensor, buffer: Tensor, span: slice, sampling: Sampling) -> Tensor | None:
    """Uniforms ``[K, n]`` that may be overwritten, or None; ``buffer`` is float32 on the CPU."""
    if sampling.uniform is not None:
        return sampling.uniform[:, span].to(like, copy=True)
    if sampling.key is None:
        return None
    if like.is_cuda and has_triton():
        from maskllm4v.gumbel import fused

        candidates, groups = like.shape
        return fused.uniforms(sampling.key, candidates, groups, like.device, first=span.start).to(like)
    fill_uniforms(buffer, sampling.key, span.start // CHUNK)
    return buffer.to(like)


@cache
def has_triton() -> bool:
    """It is not on every platform."""
    return find_spec("triton") is not None


def apply_mask(values: Tensor, p: Tensor, candidates: Tensor, hard: bool, out: Tensor | None = None) -> Tensor:
    """Values ``[n, M]`` times the soft or arg-max mask of probabilities ``[K, n]``."""
    if hard:
        return torch.mul(values, candidates[p.argmax(0)], out=out)
    if candidates.shape == (6, 4):
        return multiply_transposed(values, _mask_2_4(p), out=torch.empty_like(values) if out is None else out)
    with torch.autocast(p.device.type, enabled=False):
        return torch.mul(values, p.t() @ candidates, out=out)


def _mask_2_4(p: Tensor) -> Tensor:
    """The soft mask ``[4, n]`` in closed form: candidates k and 5 − k are complements."""
    d0, d1, d2 = p[0] - p[5], p[1] - p[4], p[2] - p[3]
    both, rest = d1 + d2, d1 - d2
    up, down = 1 + d0, 1 - d0
    mask = torch.empty((4, *d0.shape), dtype=p.dtype, device=p.device)
    torch.add(up, both, out=mask[0])
    torch.sub(up, both, out=mask[1])
    torch.add(down, rest, out=mask[2])
    torch.sub(down, rest, out=mask[3])
    return mask.mul_(0.5)


def multiply_transposed(values: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Values ``[n, 4]`` times a mask ``[4, n]``, into ``out`` ``[n, 4]``.

    A third axis keeps PyTorch off its blocked transposition, which is slow at four rows.
    """
    torch.mul(values[..., None], mask[..., None].transpose(0, 1), out=out[..., None])
    return out


def _candidate_sums(upstream: Tensor, weight: Tensor, candidates: Tensor) -> Tensor:
    """t_k = Σ_j S_kj q_j, ``[K, n]``, with q = upstream ⊙ weight, ``[n, M]``."""
    if candidates.shape == (6, 4):
        q = torch.empty(upstream.shape[::-1], dtype=upstream.dtype, device=upstream.device)
        torch.mul(upstream[..., None].transpose(0, 1), weight[..., None].transpose(0, 1), out=q[..., None])
        a, b, c, d = q
        t = torch.empty((6, *a.shape), dtype=q.dtype, device=q.device)
        for row, left, right in zip(t, (a, a, a, b, b, c), (b, c, d, c, d, d), strict=True):
            torch.add(left, right, out=row)
        return t
    with torch.autocast(upstream.device.type, enabled=False):
        return candidates @ (upstream * weight).t()
