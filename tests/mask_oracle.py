"""The mask operation in its textbook form, and inputs to hold an implementation against it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.utils.rng import CHUNK, philox_key, uniforms

ANNEALED = [(4.0, 10.0), (1.0, 100.0), (0.05, 100.0)]  # (τ, s): first and last of the recipe, and the short one
# The same with bounds on the errors of float32: of values by the largest weight, of gradients by their norm.
FLOAT32_BOUNDS = [(4.0, 10.0, 1e-6, 1e-5), (1.0, 10.0, 1e-6, 1e-5), (1.0, 100.0, 1e-6, 1e-5), (0.05, 100.0, 1e-4, 2e-4)]


def table(n: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Candidates ``[K, M]`` in lexicographic order."""
    rows = [[float(j in kept) for j in range(m)] for kept in itertools.combinations(range(m), n)]
    return torch.tensor(rows, dtype=dtype)


def noise(key: np.ndarray, candidates: int, groups: int) -> Tensor:
    """What a key draws for all groups, ``[K, groups]``."""
    parts = [uniforms(key, start // CHUNK, candidates, min(CHUNK, groups - start)) for start in range(0, groups, CHUNK)]
    return torch.cat(parts, 1) if parts else torch.empty(candidates, 0)


def textbook(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor,
    *,
    tau: float,
    scaling: float,
    hard: bool = False,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MaskLLM, Eq. 5-7, as printed: softmax over a last axis of K, then a product with the candidates."""
    z = scaling * logits.t()
    if uniform is not None:
        z = z - torch.log(-torch.log(uniform.t().to(z)))
    p = torch.softmax(z / tau, dim=-1)
    if hard:
        one_hot = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
        p = one_hot - p.detach() + p
    masked = weight * (p @ candidates).reshape(weight.shape)
    return masked, masked.square().sum()


class Case:
    """One random input, and what an implementation makes of it.

    ``uniform`` is what ``key`` draws.
    """

    def __init__(
        self, n: int = 2, m: int = 4, out: int = 6, groups_per_row: int = 5, dtype: torch.dtype = torch.float64
    ) -> None:
        self.candidates = table(n, m, dtype)
        candidates, groups = self.candidates.shape[0], out * groups_per_row
        self.weight = torch.randn(out, groups_per_row * m, dtype=dtype)
        self.logits = 0.2 * torch.randn(candidates, groups, dtype=dtype)
        self.key = philox_key(0, "case")
        self.uniform = noise(self.key, candidates, groups).to(dtype)
        self.upstream = torch.randn_like(self.weight)
        self.grad_energy = -0.37

    def run(self, function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, **how: Any) -> list[Tensor]:
        """Masked weight, energy, and the gradients of <upstream, wm> − 0.37·energy by logits and weight."""
        weight = self.weight.to(dtype, copy=True).requires_grad_()
        logits = self.logits.to(dtype, copy=True).requires_grad_()
        given = {"uniform": self.uniform.to(dtype)} if "uniform" not in how else {}
        masked, energy = function(weight, logits, self.candidates.to(dtype), **given, **how)
        loss = (masked * self.upstream.to(dtype)).sum() + self.grad_energy * energy
        return [masked.detach(), energy.detach(), *torch.autograd.grad(loss, (logits, weight))]

    def drawn(self, backend: str, dtype: torch.dtype, **how: Any) -> list[Tensor]:
        """What a backend makes of it, which draws its noise itself."""
        return self.run(masked_weight, dtype, backend=backend, uniform=None, key=self.key, **how)


def largest(difference: Tensor, relative_to: Tensor) -> float:
    return float(difference.abs().max() / relative_to.abs().max())


def norm(difference: Tensor, relative_to: Tensor) -> float:
    return float(difference.norm() / relative_to.norm())


def errors(found: Sequence[Tensor], exact: Sequence[Tensor], weight: Tensor) -> list[float]:
    """Of the masked weight, the energy, and the gradients by logits and weight."""
    differences = [a.double() - b for a, b in zip(found, exact, strict=True)]
    return [
        largest(differences[0], weight),
        abs(float(differences[1] / exact[1])),
        norm(differences[2], exact[2]),
        norm(differences[3], exact[3]),
    ]


def equal_in_float64(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Values to 1e-12, gradients to 1e-10."""
    assert float((found[0] - exact[0]).abs().max()) <= 1e-12
    assert abs(float(found[1] - exact[1])) <= 1e-12 * float(exact[1])
    for a, b in zip(found[2:], exact[2:], strict=True):
        assert float(b.norm()) > 0
        assert norm(a - b, b) <= 1e-10
