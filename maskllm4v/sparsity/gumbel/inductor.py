"""The mask operation for 2:4 through ``torch.compile``: noise, softmax and mask in one pass over a span.

What Inductor makes of it keeps everything between logits and mask in registers, the random words
included. It needs a C++ compiler (CPU) or Triton (GPU), and some seconds the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskllm4v.sparsity.gumbel.eager import energy_dtype, from_rows, spans, to_rows, wide
from maskllm4v.sparsity.gumbel.philox import uniforms_of
from maskllm4v.sparsity.gumbel.sampling import Sampling

SPAN = 2**19  # groups: calls cost more than leaving the cache, for only inputs and results take room


def supported(candidates: Tensor, sampling: Sampling) -> bool:
    """Whether this backend computes that: soft 2:4 masks of drawn noise."""
    return candidates.shape == (6, 4) and not sampling.hard and sampling.key is not None and sampling.uniform is None


def forward(
    weight: Tensor, logits: Tensor, candidates: Tensor, sampling: Sampling, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`maskllm4v.sparsity.gumbel.eager.forward`."""
    masked = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    energy = torch.zeros((), dtype=energy_dtype(weight), device=weight.device)
    scalars, masked_rows, at_one = _scalars(sampling, logits), _compiled(_masked_rows), sampling.tau == 1
    for span in spans(logits.shape[1], SPAN):
        rows = masked_rows(_part(logits, span), *scalars, _start(span, logits), to_rows(weight[span]), at_one)
        from_rows(rows, masked[span])
        energy += torch.dot(rows.view(-1), rows.view(-1))
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
    """As :func:`maskllm4v.sparsity.gumbel.eager.backward`."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if weight_grad else None
    scalars, gradients, at_one = _scalars(sampling, logits), _compiled(_gradients), sampling.tau == 1
    for span in spans(logits.shape[1], SPAN):
        w, upstream = to_rows(weight[span]), to_rows(grad_masked[span])
        found = gradients(_part(logits, span), *scalars, _start(span, logits), w, upstream, grad_energy, at_one)
        grad_logits[:, span] = found[0]
        if grad_weight is not None:
            from_rows(found[1], grad_weight[span])
    return grad_logits, grad_weight


def _scalars(sampling: Sampling, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """τ, s and the key as tensors: other values compile nothing again."""
    signed = [word - 2**64 if word >> 63 else word for word in sampling.key or ()]
    numbers = (sampling.tau, sampling.scaling)
    tau, scaling = (logits.new_tensor(value, dtype=energy_dtype(logits)) for value in numbers)
    return tau, scaling, logits.new_tensor(signed, dtype=torch.int64)


def _part(logits: Tensor, span: slice) -> Tensor:
    """Contiguous, and never a view, for which everything would be compiled once more."""
    return wide(logits[:, span]).contiguous().data


def _start(span: slice, logits: Tensor) -> Tensor:
    return logits.new_tensor(span.start, dtype=torch.int64)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Any number of groups with one compilation, but for the last argument, which makes two forms."""
    return torch.compile(function, dynamic=True)


def _probabilities(
    logits: Tensor, tau: Tensor, scaling: Tensor, key: Tensor, start: Tensor, at_one: bool
) -> list[Tensor]:
    """p = softmax((s·l + g)/τ), six tensors ``[n]``."""
    uniform = uniforms_of(key, start, logits.shape[1], 6)
    e = [-torch.log(u.to(logits.dtype)) for u in uniform]
    z = [row * scaling for row in logits]
    if not at_one:
        z = [(row - torch.log(noise)) / tau for row, noise in zip(z, e, strict=True)]
    top = torch.maximum(torch.maximum(_largest(z[:2]), _largest(z[2:4])), _largest(z[4:]))
    p = [torch.exp(row - top) for row in z]
    if at_one:
        p = [row / noise for row, noise in zip(p, e, strict=True)]
    total = ((p[0] + p[1]) + (p[2] + p[3])) + (p[4] + p[5])
    return [row / total for row in p]


def _largest(pair: list[Tensor]) -> Tensor:
    return torch.maximum(pair[0], pair[1])


def _mask(p: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d0, d1, d2 = p[0] - p[5], p[1] - p[4], p[2] - p[3]
    both, rest = d1 + d2, d1 - d2
    up, down = 1 + d0, 1 - d0
    return 0.5 * (up + both), 0.5 * (up - both), 0.5 * (down + rest), 0.5 * (down - rest)


def _masked_rows(
    logits: Tensor, tau: Tensor, scaling: Tensor, key: Tensor, start: Tensor, weight: Tensor, at_one: bool
) -> Tensor:
    """Masked weight ``[4, n]`` of a weight ``[4, n]``."""
    mask = _mask(_probabilities(logits, tau, scaling, key, start, at_one))
    return torch.stack([w * m for w, m in zip(weight, mask, strict=True)])


def _gradients(
    logits: Tensor,
    tau: Tensor,
    scaling: Tensor,
    key: Tensor,
    start: Tensor,
    weight: Tensor,
    grad_masked: Tensor,
    grad_energy: Tensor,
    at_one: bool,
) -> tuple[Tensor, Tensor]:
    """By logits ``[6, n]`` and by weight ``[4, n]``; weight and grad_masked come as ``[4, n]``."""
    p = _probabilities(logits, tau, scaling, key, start, at_one)
    mask = _mask(p)
    upstream = [g.to(w.dtype) + 2 * grad_energy * (w * m) for w, g, m in zip(weight, grad_masked, mask, strict=True)]
    a, b, c, d = (u * w for u, w in zip(upstream, weight, strict=True))
    mean = (mask[0] * a + mask[1] * b) + (mask[2] * c + mask[3] * d)
    slope = scaling / tau
    pairs = (a + b, a + c, a + d, b + c, b + d, c + d)
    by_logits = torch.stack([slope * row * (pair - mean) for row, pair in zip(p, pairs, strict=True)])
    return by_logits, torch.stack([u * m for u, m in zip(upstream, mask, strict=True)])
