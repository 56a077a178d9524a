"""The hot operation: logits and Gumbel noise in, softly masked weights out.

For each group of M weights with logits l, scaling s, temperature τ and Gumbel noise g,
p = softmax((s·l + g)/τ) mixes the K candidate masks S into a soft mask m = Sᵀp (MaskLLM,
arXiv 2409.17481, Eq. 5-7). Forward gives w ⊙ m and Σ(w ⊙ m)²; backward is in closed form,

    q_j = (∂L/∂wm_j + 2·∂L/∂Σ·wm_j)·w_j,   t_k = Σ_j S_kj q_j,   ∂L/∂l_k = (s/τ)·p_k·(t_k − Σ_i p_i t_i),

where with straight-through masks wm is the hard masked weight and p the soft probabilities. For 2:4 both
Sᵀp and t are written out: candidate k and 5−k are complements, so three differences of probabilities
give all four mask values. Noise is a function of a key and is drawn again in backward: autograd keeps
the inputs and nothing else.

Backends give the same function of the same noise, up to rounding: :mod:`~maskllm4v.sparsity.gumbel.eager` (plain
PyTorch), :mod:`~maskllm4v.sparsity.gumbel.triton_op` (Triton) and :mod:`~maskllm4v.sparsity.gumbel.inductor`
(``torch.compile``). With one logit per position instead of one per candidate mask, it is another function:
:mod:`~maskllm4v.sparsity.gumbel.topn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.sparsity.gumbel.backends import BACKENDS, choose
from maskllm4v.sparsity.gumbel.eager import energy_dtype
from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.utils.errors import ConfigError

__all__ = ["BACKENDS", "masked_weight"]


def masked_weight(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor | None,
    *,
    tau: float | Tensor,
    scaling: float | Tensor,
    hard: bool = False,
    uniform: Tensor | None = None,
    key: np.ndarray | Tensor | None = None,
    sizes: Sequence[int] | None = None,
    kept: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample a mask for every group and apply it.

    Args:
        weight: ``[out, in]``, frozen or not.
        logits: ``[K, groups]``; groups in row-major order of the weight.
        candidates: ``[K, M]`` of zeros and ones in the weight's dtype, lexicographic order. None: one logit a position,
            ``[M, groups]``, of which ``kept`` are kept; K is M then, also in what follows.
        tau: temperature τ > 0. As a float64 scalar tensor on the CPU its value can change without ``torch.compile``
            compiling again.
        scaling: s, the factor on the logits; as ``tau``.
        hard: use the arg-max candidate forward and the soft gradient backward (straight-through).
        uniform: noise in (0, 1), ``[K, groups]``; for tests and replays.
        key: Philox key to draw the noise with, if ``uniform`` is not given: two uint64, or the same bits as
            an int64 tensor on the CPU. With neither there is no noise.
        sizes: for several layers side by side along the groups: how many groups each has. ``key`` is ``[layers, 2]``
            then, and each layer gets the noise that it would get alone. The weight is ``[groups, M]``.
        kept: N, with ``candidates=None``.
        dtype: of the masked weight, the weight's by default. Sums and gradients are computed in the weight's.
        backend: one of :data:`BACKENDS`; ``"auto"`` takes Triton for 2:4 on CUDA, else plain PyTorch, but in a
            graph that ``torch.compile`` makes for the CPU ``"compiled"``.

    Returns:
        The masked weight ``[out, in]`` and the sum of its squares (scalar), both differentiable with
        respect to ``logits``, and ``weight`` if it asks for a gradient.

    Raises:
        ConfigError: the backend is unknown, or cannot do this; ``candidates`` and ``kept`` are both missing.
        ValueError: ``sizes`` are not those of the keys and logits.
    """
    if candidates is None and kept is None:
        raise ConfigError("a logit a position needs kept, how many positions of a group are kept")
    if isinstance(key, np.ndarray):
        key = torch.from_numpy(key.view(np.int64))
    if sizes is not None and (key is None or len(sizes) != len(key) or sum(sizes) != logits.shape[1]):
        raise ValueError(f"{len(sizes)} layers of {sum(sizes)} groups, but logits of {logits.shape[1]} groups")
    parts = None if sizes is None else list(sizes)
    how = (_scalar(tau), _scalar(scaling), hard, uniform, key, parts, kept, dtype or weight.dtype)
    if torch.compiler.is_compiling():
        compiled = backend == "auto" and not weight.is_cuda
        return _masked_weight(weight, logits, candidates, *how, "compiled" if compiled else backend)
    masked: tuple[Tensor, Tensor] = _MaskedWeight.apply(weight, logits, candidates, *how, backend)
    return masked


def _scalar(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _sampling(
    tau: Tensor,
    scaling: Tensor,
    hard: bool,
    uniform: Tensor | None,
    key: Tensor | None,
    sizes: list[int] | None,
    kept: int | None,
) -> Sampling:
    """The host's view of the tensors, which lie on the CPU: nothing waits for a device."""
    keys: list[Any] = [] if key is None else key.numpy().view(np.uint64).reshape(-1, 2).tolist()
    words = [(first, second) for first, second in keys]
    one = words[0] if words and sizes is None else None
    joined = () if sizes is None else tuple(zip(sizes, words, strict=True))
    return Sampling(float(tau.numpy()), float(scaling.numpy()), hard, one, uniform, kept, joined)


def _groups(weight: Tensor, logits: Tensor, candidates: Tensor | None) -> Tensor:
    """``[groups, M]``."""
    return weight.reshape(-1, len(logits) if candidates is None else candidates.shape[1])


def _forward(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor | None,
    tau: Tensor,
    scaling: Tensor,
    hard: bool,
    uniform: Tensor | None,
    key: Tensor | None,
    sizes: list[int] | None,
    kept: int | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    w, sampling = _groups(weight, logits, candidates), _sampling(tau, scaling, hard, uniform, key, sizes, kept)
    masked, energy = choose(backend, w, logits, candidates, sampling).forward(w, logits, candidates, sampling, dtype)
    return masked.view(weight.shape), energy


def _backward(
    grad_masked: Tensor,
    grad_energy: Tensor,
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor | None,
    tau: Tensor,
    scaling: Tensor,
    hard: bool,
    uniform: Tensor | None,
    key: Tensor | None,
    sizes: list[int] | None,
    kept: int | None,
    weight_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    w, sampling = _groups(weight, logits, candidates), _sampling(tau, scaling, hard, uniform, key, sizes, kept)
    chosen = choose(backend, w, logits, candidates, sampling)
    upstream = grad_masked.reshape(w.shape)
    grad_logits, grad_weight = chosen.backward(w, logits, candidates, sampling, upstream, grad_energy, weight_grad)
    return grad_logits, w.new_empty(0) if grad_weight is None else grad_weight.view(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    """For backward: the inputs."""
    weight, logits, candidates, tau, scaling, hard, uniform, key, sizes, kept, _, backend = inputs
    ctx.save_for_backward(weight, logits, candidates, tau, scaling, uniform, key)
    ctx.hard, ctx.sizes, ctx.kept, ctx.backend = hard, sizes, kept, backend


def _gradients(ctx: Any, backward: Any, grad_masked: Tensor, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
    weight, logits, candidates, tau, scaling, uniform, key = ctx.saved_tensors
    weight_grad = ctx.needs_input_grad[0]
    grad_logits, grad_weight = backward(
        grad_masked,
        grad_energy,
        weight,
        logits,
        candidates,
        tau,
        scaling,
        ctx.hard,
        uniform,
        key,
        ctx.sizes,
        ctx.kept,
        weight_grad,
        ctx.backend,
    )
    return grad_weight if weight_grad else None, grad_logits, *[None] * 10


class _MaskedWeight(torch.autograd.Function):
    """The operation outside of a compiled graph: the custom operator below costs more a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _keep(ctx, inputs)
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the mask operation cannot be differentiated twice (create_graph=True)")
        return _gradients(ctx, _backward, *grads)


# The same inside a compiled graph, where an operator breaks no graph and its noise is not traced.
_masked_weight = torch.library.custom_op("maskllm4v::masked_weight", _forward, mutates_args=())
_masked_weight_backward = torch.library.custom_op("maskllm4v::masked_weight_backward", _backward, mutates_args=())


@_masked_weight.register_fake
def _(weight: Tensor, logits: Tensor, candidates: Tensor | None, *how: Any) -> tuple[Tensor, Tensor]:
    dtype: torch.dtype = how[7]
    return weight.new_empty(weight.shape, dtype=dtype), weight.new_empty((), dtype=energy_dtype(weight))


@_masked_weight_backward.register_fake
def _(grad_masked: Tensor, grad_energy: Tensor, weight: Tensor, logits: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    weight_grad: bool = how[8]
    return logits.new_empty(logits.shape), weight.new_empty(weight.shape if weight_grad else 0)


def _operator_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _masked_weight_backward, *grads)


_masked_weight.register_autograd(_operator_gradients, setup_context=_keep)
