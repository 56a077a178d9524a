"""Which implementation of the mask operation computes a layer."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from maskllm4v.errors import ConfigError
from maskllm4v.gumbel import chunked, compiled, positions
from maskllm4v.gumbel.sampling import Sampling

BACKENDS = ("auto", "chunked", "compiled", "triton")


class Backend(Protocol):
    """What a backend does; see :mod:`maskllm4v.gumbel.chunked` for shapes."""

    def forward(
        self, weight: Tensor, logits: Tensor, candidates: Any, sampling: Sampling, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        weight: Tensor,
        logits: Tensor,
        candidates: Any,
        sampling: Sampling,
        grad_masked: Tensor,
        grad_energy: Tensor,
        weight_grad: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


def choose(name: str, weight: Tensor, logits: Tensor, candidates: Tensor | None, sampling: Sampling) -> Backend:
    """The backend of that name; for ``"auto"`` Triton for 2:4 on CUDA, else plain PyTorch.

    ``"compiled"`` computes what it is not made for (hard masks, other patterns, a logit a position) as ``"auto"`` does.

    Raises:
        ConfigError: unknown, or Triton was asked for what it cannot do.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; allowed: {', '.join(BACKENDS)}")
    if candidates is None:
        if name == "triton":
            raise ConfigError(
                "backend is 'triton', which needs a logit a candidate; allowed for one a position: 'auto'"
            )
        return positions
    if name == "compiled" and compiled.supported(candidates, sampling):
        return compiled
    if name == "chunked" or (name != "triton" and not weight.is_cuda):
        return chunked
    fused = import_module("maskllm4v.gumbel.fused") if chunked.has_triton() else None
    if fused is not None and fused.supported(weight, logits, candidates, sampling):
        return fused
    if name == "triton":
        raise ConfigError("backend is 'triton', which needs a GPU that Triton knows, 2:4, and 16 or 32 bits")
    return chunked
