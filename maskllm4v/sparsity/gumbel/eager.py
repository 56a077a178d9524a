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

from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.utils.rng import fill_uniforms

CPU_SPAN = 32_768  # groups: more leave the cache, fewer are not worth a call
THREAD_SPAN = 16_384  # groups a thread, where there are many
CUDA_SPAN = 2**20  # there is no cache to stay in, and every launch costs


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
    with torch.inference_mode():  # calls cost less
        for span, p in _probabilities(logits, sampling):
            w = wide(weight[span])
            product = masked[span] if dtype == w.dtype else torch.empty_like(w)
            apply_mask(w, p, candidates, sampling.hard, out=product)
            if dtype != w.dtype:
                masked[span] = product
            energy += product.square().sum(dtype=energy.dtype)
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
    slope, twice = _number(sampling.scaling / sampling.tau, logits), 2 * grad_energy
    with torch.inference_mode():
        for span, p in _probabilities(logits, sampling):
            if candidates.shape == (6, 4) and not sampling.hard:
                w, g, mask = to_rows(weight[span]), to_rows(grad_masked[span]), _mask_2_4(p)
                upstream = torch.addcmul(g, w * mask, twice)
                t = _pair_sums(w.mul_(upstream))
                if grad_weight is not None:
                    from_rows(upstream.mul_(mask), grad_weight[span])
            else:
                w, g = wide(weight[span]), wide(grad_masked[span])
                upstream = torch.addcmul(g, apply_mask(w, p, candidates, sampling.hard), twice)
                t = _candidate_sums(upstream * w, candidates)
                if grad_weight is not None:
                    grad_weight[span] = apply_mask(upstream, p, candidates, sampling.hard)
            t.sub_((p * t).sum(0)).mul_(p)
            if t.dtype == logits.dtype:
                torch.mul(t, slope, out=grad_logits[:, span])
            else:
                grad_logits[:, span] = t * slope
    return grad_logits, grad_weight


def energy_dtype(weight: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """In float32 at least: 16 bits are too few to compute masks in."""
    return x.to(energy_dtype(x))


def spans(groups: int, width: int) -> list[slice]:
    """Slices of the groups that are worked on together."""
    return [slice(a, min(a + width, groups)) for a in range(0, groups, width)]


def _probabilities(logits: Tensor, sampling: Sampling) -> Iterator[tuple[slice, Tensor]]:
    """p = softmax((s·l + g)/τ), ``[K, n]``, with g = −log(−log u), of one span after the other.

    All share their memory, so that it stays in cache.
    """
    p = row = buffer = torch.empty(0)
    scaling, tau = _number(sampling.scaling, logits), _number(sampling.tau, logits)
    width = CUDA_SPAN if logits.is_cuda else max(CPU_SPAN, THREAD_SPAN * torch.get_num_threads())
    for span in spans(logits.shape[1], width):
        part = wide(logits[:, span])
        if p.shape != part.shape:
            p, row = torch.empty_like(part), torch.empty_like(part[0])
            buffer = torch.empty(part.shape, dtype=torch.float32, device="cpu")
        torch.mul(part, scaling, out=p)
        u = noise(p, buffer, span, sampling)
        if u is not None and sampling.tau == 1:
            # exp(s·l + g) = exp(s·l)/E with E = −log u: a logarithm less. The sign cancels in what follows.
            _exp_(p, row).div_(u.log_())
        else:
            if u is not None:
                p.sub_(u.log_().neg_().log_())
            _exp_(p.div_(tau), row)
        yield span, p.div_(torch.sum(p, 0, out=row))


def _number(value: float, like: Tensor) -> Tensor:
    """As a tensor that no operation has to convert; on the CPU."""
    return torch.tensor(value, dtype=energy_dtype(like))


def _exp_(z: Tensor, row: Tensor) -> Tensor:
    """exp(z − max z) in place."""
    return z.sub_(torch.amax(z, 0, out=row)).exp_()


def noise(like: Tensor, buffer: Tensor, span: slice, sampling: Sampling) -> Tensor | None:
    """Uniforms ``[K, n]`` that may be overwritten, or None; ``buffer`` is float32 on the CPU."""
    if sampling.uniform is not None:
        return sampling.uniform[:, span].to(like, copy=True)
    if not sampling.draws:
        return None
    if like.is_cuda and has_triton():
        from maskllm4v.sparsity.gumbel import triton_op

        drawn = [
            triton_op.uniforms(key, len(like), part.stop - part.start, like.device, first)
            for part, key, first in sampling.parts(span)
        ]
        return (drawn[0] if len(drawn) == 1 else torch.cat(drawn, 1)).to(like)
    for part, key, first in sampling.parts(span):
        fill_uniforms(buffer[:, part], key, first)
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
        return torch.mul(from_rows(_mask_2_4(p), torch.empty_like(values)), values, out=out)
    with torch.autocast(p.device.type, enabled=False):
        return torch.mul(values, p.t() @ candidates.to(p.dtype), out=out)


def _mask_2_4(p: Tensor) -> Tensor:
    """The soft mask ``[4, n]`` in closed form: candidates k and 5 − k are complements."""
    p0, p1, p2, p3, p4, p5 = p.unbind(0)
    d0, d1, d2 = p0 - p5, p1 - p4, p2 - p3
    both, rest = d1 + d2, d1.sub_(d2)
    one = _number(1.0, p)
    up, down = one + d0, one - d0
    mask = torch.empty((4, *d0.shape), dtype=p.dtype, device=p.device)
    for row, base, change, sign in zip(
        mask.unbind(0), (up, up, down, down), (both, both, rest, rest), (1, -1, 1, -1), strict=True
    ):
        torch.add(base, change, alpha=sign, out=row)
    return mask.mul_(0.5)


def _pair_sums(q: Tensor) -> Tensor:
    """t_k = Σ_j S_kj q_j, ``[6, n]``, of q ``[4, n]``, for 2:4."""
    a, b, c, d = q.unbind(0)
    t = torch.empty((6, *a.shape), dtype=q.dtype, device=q.device)
    for row, left, right in zip(t.unbind(0), (a, a, a, b, b, c), (b, c, d, c, d, d), strict=True):
        torch.add(left, right, out=row)
    return t


def _candidate_sums(q: Tensor, candidates: Tensor) -> Tensor:
    """t_k = Σ_j S_kj q_j, ``[K, n]``, of q ``[n, M]``."""
    if candidates.shape == (6, 4):
        return _pair_sums(to_rows(q))
    with torch.autocast(q.device.type, enabled=False):
        return candidates.to(q.dtype) @ q.t()


# A third axis keeps PyTorch off its blocked transposition, which is slow at four rows.


def to_rows(x: Tensor) -> Tensor:
    """``[n, 4]`` as contiguous ``[4, n]``, :func:`wide`."""
    rows = torch.empty(x.shape[::-1], dtype=energy_dtype(x), device=x.device)
    rows[..., None].copy_(x[..., None].transpose(0, 1))
    return rows


def from_rows(rows: Tensor, out: Tensor) -> Tensor:
    """The reverse, into ``out`` ``[n, 4]``."""
    out[..., None].copy_(rows[..., None].transpose(0, 1))
    return out
