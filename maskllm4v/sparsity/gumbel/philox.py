"""The noise of :func:`maskllm4v.utils.rng.uniforms` in PyTorch's operations, for ``torch.compile`` to fuse.

Uncompiled it is slow: hundreds of passes over 64-bit integers. NumPy draws the same numbers faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskllm4v.utils.rng import CHUNK

# Philox4x64-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Table 2
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS = 10
_LOW = 0xFFFFFFFF


def uniforms_of(key: Tensor, start: Tensor, groups: int, candidates: int) -> list[Tensor]:
    """Noise in (0, 1) of some groups, a float32 tensor ``[groups]`` a candidate.

    Args:
        key: int64 ``[2]``.
        start: the first group, a scalar tensor, so that another one does not compile again.
        groups: how many.
        candidates: K.
    """
    group = torch.arange(groups, device=key.device) + start
    blocks = -(-candidates // 8)
    counter, chunk = 1 + (group % CHUNK) * blocks, group // CHUNK
    words = [word for block in range(blocks) for word in _philox(counter + block, chunk, key[0], key[1])]
    found = []
    for k in range(candidates):
        top = (words[k // 2] >> (9 + 32 * (k % 2))) & 0x7FFFFF  # 23 bits of the k-th 32-bit word
        found.append((top.to(torch.int32).to(torch.float32) + 0.5) * 2.0**-23)
    return found


def _philox(c0: Tensor, c1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 64-bit words of the block with counter ``(c0, c1, 0, 0)``."""
    c2 = c3 = torch.zeros_like(c0)
    for round_ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        key0, key1 = k0 + _signed(round_ * WEYL[0]), k1 + _signed(round_ * WEYL[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return c0, c1, c2, c3


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low half of a 128-bit product, by halves of 32 bits (``>>`` on int64 extends the sign)."""
    high, low = (x >> 32) & _LOW, x & _LOW
    f_high, f_low = factor >> 32, factor & _LOW
    low_low, low_high, high_low = low * f_low, low * f_high, high * f_low
    middle = ((low_low >> 32) & _LOW) + (low_high & _LOW) + (high_low & _LOW)
    top = high * f_high + ((low_high >> 32) & _LOW) + ((high_low >> 32) & _LOW) + ((middle >> 32) & _LOW)
    return top, (middle << 32) | (low_low & _LOW)


def _signed(value: int) -> int:
    """The low 64 bits as int64."""
    value &= 2**64 - 1
    return value - 2**64 if value >> 63 else value
