"""Which implementation of the mask operation computes a layer."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from maskllm4v.sparsity.gumbel import eager, inductor, topn
from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.utils.errors import ConfigError

# Names as in settings and records: "chunked" is eager.py, "compiled" inductor.py.
BACKENDS = ("auto", "chunked", "compiled", "triton")


class Backend(Protocol):
    """What a backend does; see :mod:`maskllm4v.sparsity.gumbel.eager` for shapes."""

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
        return topn
    if name == "compiled" and inductor.supported(candidates, sampling):
        return inductor
    if name == "chunked" or (name != "triton" and not weight.is_cuda):
        return eager
    triton_op = import_module("maskllm4v.sparsity.gumbel.triton_op") if eager.has_triton() else None
    if triton_op is not None and triton_op.supported(weight, logits, candidates, sampling):
        return triton_op
    if name == "triton":
        raise ConfigError("backend is 'triton', which needs a GPU that Triton knows, 2:4, and 16 or 32 bits")
    return eager
