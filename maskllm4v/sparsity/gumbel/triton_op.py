"""The 2:4 mask operation as one Triton kernel forward and one backward: no intermediate reaches memory.

Noise is recomputed in backward, so nothing but the inputs has to be kept. Other patterns take only their noise
from here (:func:`uniforms`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from maskllm4v.sparsity.gumbel import triton_kernels
from maskllm4v.sparsity.gumbel.sampling import Sampling

# A thread has one whole group. Its mask, its four weights, its six logits and their gradients then stay in its
# own 32 registers, which lets a multiprocessor hold 2,048 threads; with two or four groups a thread, loads
# of logits are wider, but every mask and gradient goes through shared memory (7 to 28 exchanges).
BLOCK = 256  # groups of a program
_OPTIONS = {"num_warps": BLOCK // 32, "enable_fp_fusion": True}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WORDS = 8  # 32-bit words in one Philox4x64 block


def supported(weight: Tensor, logits: Tensor, candidates: Tensor, sampling: Sampling) -> bool:
    """Whether :func:`forward` and :func:`backward` can take these tensors: 2:4, no float64, on a GPU.

    Under Triton's interpreter (``TRITON_INTERPRET=1``) every device will do.
    """
    noise = [] if sampling.uniform is None else [sampling.uniform]
    return (
        candidates.shape == (6, 4)
        and weight.dtype in _DTYPES
        and logits.dtype in _DTYPES
        and all(t.device == weight.device for t in (logits, *noise))
        and (weight.is_cuda or not isinstance(triton_kernels.philox_uniforms, triton.JITFunction))
    )


def forward(
    weight: Tensor, logits: Tensor, candidates: Tensor, sampling: Sampling, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sample a mask for every group and apply it.

    Args:
        weight: ``[G, 4]``.
        logits: ``[6, G]``.
        candidates: ``[6, 4]``, in lexicographic order.
        sampling: how masks are drawn.
        dtype: of the masked weight.

    Returns:
        The masked weight ``[G, 4]``, and the sum of squares of its float32 values before they are rounded to
        ``dtype`` (a scalar, float32).
    """
    weight, logits = weight.contiguous(), logits.contiguous()
    masked = torch.empty_like(weight, dtype=dtype)
    programs, how = _programs(sampling, len(weight)), _draw(sampling, weight.device)
    energies = torch.empty(programs, dtype=torch.float32, device=weight.device)
    if programs:
        with torch.cuda.device_of(weight):
            triton_kernels.masked_weight_forward[(programs,)](
                weight=weight,
                logits=logits,
                masked=masked,
                energies=energies,
                groups=len(weight),
                **how,
                BLOCK=BLOCK,
                **_OPTIONS,
            )
    return masked, energies.sum()


def backward(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor,
    sampling: Sampling,
    grad_masked: Tensor,
    grad_energy: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`forward`'s inputs.

    Args:
        weight: ``[G, 4]``.
        logits: ``[6, G]``.
        candidates: ``[6, 4]``, in lexicographic order.
        sampling: as given to :func:`forward`.
        grad_masked: ``[G, 4]``, of the masked weight.
        grad_energy: scalar, of the sum of squares; only the device reads it.
        weight_grad: whether the weight needs a gradient too.

    Returns:
        The gradients of the logits ``[6, G]`` and of the weight ``[G, 4]``, if asked for.
    """
    weight, logits, grad_masked = weight.contiguous(), logits.contiguous(), grad_masked.contiguous()
    grad_logits = torch.empty_like(logits)
    grad_weight = torch.empty_like(weight) if weight_grad else None
    programs, how = _programs(sampling, len(weight)), _draw(sampling, weight.device)
    if programs:
        with torch.cuda.device_of(weight):
            triton_kernels.masked_weight_backward[(programs,)](
                weight=weight,
                logits=logits,
                grad_masked=grad_masked,
                grad_energy=grad_energy,
                grad_logits=grad_logits,
                grad_weight=grad_weight,
                groups=len(weight),
                **how,
                WEIGHT_GRAD=weight_grad,
                BLOCK=BLOCK,
                **_OPTIONS,
            )
    return grad_logits, grad_weight


def uniforms(key: tuple[int, int], candidates: int, groups: int, device: torch.device | str, first: int = 0) -> Tensor:
    """The numbers of :func:`maskllm4v.utils.rng.uniforms` over all chunks, on ``device``.

    Args:
        key: Philox key, two unsigned 64-bit integers.
        candidates: K.
        groups: G.
        device: where to draw them.
        first: index of the first group.

    Returns:
        float32 ``[K, G]``.
    """
    noise = torch.empty(candidates, groups, dtype=torch.float32, device=device)
    blocks = triton.cdiv(candidates, _WORDS)
    if noise.numel():
        with torch.cuda.device_of(noise):
            triton_kernels.philox_uniforms[(triton.cdiv(groups, BLOCK), blocks)](
                noise=noise,
                candidates=candidates,
                blocks=blocks,
                groups=groups,
                first=first,
                key0=int(key[0]),
                key1=int(key[1]),
                BLOCK=BLOCK,
                **_OPTIONS,
            )
    return noise


def _programs(sampling: Sampling, groups: int) -> int:
    """How many programs compute so many groups: none computes two layers'."""
    return sum(triton.cdiv(size, BLOCK) for size, _ in sampling.joined) or triton.cdiv(groups, BLOCK)


def _draw(sampling: Sampling, device: torch.device) -> dict[str, object]:
    """The kernels' arguments that say how to draw; floats all, for an integer would be another kernel."""
    key, uniform = sampling.key or (0, 0), sampling.uniform
    layers = keys = None
    if sampling.joined:
        sizes = tuple(size for size, _ in sampling.joined)
        layers, signed = _places(sizes, BLOCK, device), [_signed(word) for _, key in sampling.joined for word in key]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        rows = torch.tensor([starts, signed[::2], signed[1::2]]).t().contiguous()
        keys = rows.to(device, non_blocking=True)
    return {
        "uniform": None if uniform is None else uniform.contiguous(),
        "key0": int(key[0]),
        "key1": int(key[1]),
        "scaling": float(sampling.scaling),
        "inverse_tau": 1.0 / sampling.tau,
        "layers": layers,
        "keys": keys,
        "NOISE": "given" if uniform is not None else "drawn" if sampling.draws else "none",
        "HARD": sampling.hard,
        "JOINED": bool(sampling.joined),
    }


@lru_cache(maxsize=64)
def _places(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """By program ``[programs, 3]``, int64: its first group, how many are left of its layer, and which layer it is."""
    found, start = [], 0
    for layer, size in enumerate(sizes):
        found += [(start + offset, size - offset, layer) for offset in range(0, size, block)]
        start += size
    return torch.tensor(found, dtype=torch.int64, device=device)


def _signed(word: int) -> int:
    """The same 64 bits as a signed integer."""
    return word - 2**64 if word >> 63 else word
