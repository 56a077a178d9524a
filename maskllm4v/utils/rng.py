"""Randomness as a pure function of (seed, purpose, ...), so that nothing has to be saved or replayed.

Every draw comes from a counter-based generator (Philox4x64-10: Salmon et al. 2011, *Parallel random
numbers: as easy as 1, 2, 3*) whose key is a digest of what the draw is for. The number of loader
workers, of processes, or of steps run before therefore changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 16_384  # groups drawn from one counter range; part of the noise's definition
_WORDS = 8  # 32-bit words in one Philox4x64 block
_ONE = np.uint32(0x3F800000)  # the bits of 1.0
_OFFSET = np.float32(1 - 2.0**-24)


def philox_key(seed: int, *purpose: int | str) -> np.ndarray:
    """The 128-bit key (two uint64) of a purpose: the first half of its SHA-256."""
    text = json.dumps([seed, *purpose], separators=(",", ":"))
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8").astype(np.uint64)


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose, e.g. ``generator(seed, "order", epoch)``."""
    return np.random.Generator(np.random.Philox(key=philox_key(seed, *purpose)))


def torch_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for code that draws from torch's own generator."""
    return int(philox_key(seed, *purpose)[0] >> np.uint64(1))


@contextmanager
def seeded_steps(device: torch.device, seed: int) -> Iterator[Callable[[int, int, int], None]]:
    """For layers that draw from torch's own generators, such as dropout and drop-path.

    Gives a function that seeds them for (step, micro-step, rank); afterwards they are as they were before.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):

        def seed_step(step: int, micro_step: int = 0, rank: int = 0) -> None:
            value = torch_seed(seed, "layers", step, micro_step, rank)
            if device.type == "cpu":
                torch.default_generator.manual_seed(value)
            else:
                torch.manual_seed(value)  # of all kinds of devices, which costs half a millisecond

        yield seed_step


def uniforms(key: np.ndarray | tuple[int, int], chunk: int, candidates: int, groups: int) -> Tensor:
    """The noise of one chunk of groups, strictly inside (0, 1).

    Group ``g`` of chunk ``c`` owns the Philox blocks with counters ``(1 + g·B + b, c, 0, 0)``, where
    ``B = ceil(K / 8)`` and ``b < B``; candidate ``k`` takes the k-th 32-bit word of them (low half of
    each 64-bit output first). With ``t`` its top 23 bits, u = (t + ½)·2⁻²³, which float32 holds exactly;
    24 bits would round to 1, an infinite Gumbel, once in 2²⁴ draws.

    Args:
        key: from :func:`philox_key`.
        chunk: index of the chunk of :data:`CHUNK` groups.
        candidates: K.
        groups: how many groups of the chunk exist.

    Returns:
        float32 ``[K, groups]``.
    """
    found = torch.empty(candidates, groups, dtype=torch.float32, device="cpu")
    fill_uniforms(found, key, chunk * CHUNK)
    return found


def fill_uniforms(out: Tensor, key: np.ndarray | tuple[int, int], first: int) -> None:
    """The same noise of any range of groups.

    Args:
        out: float32 ``[K, groups]`` on the CPU.
        key: from :func:`philox_key`.
        first: the first group.
    """
    start = 0
    while start < out.shape[1]:
        stop = min(start + CHUNK - (first + start) % CHUNK, out.shape[1])
        _draw(_stream.at(key, first + start, out.shape[0]), out[:, start:stop].numpy())
        start = stop


class _Stream(threading.local):
    """A generator of each thread, set anew for each key: making one costs ten times as much."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.state: Any = self.bits.state

    def at(self, key: np.ndarray | tuple[int, int], group: int, candidates: int) -> np.random.Philox:
        """The words of a group and of those after it in its chunk."""
        place = self.state["state"]  # it counts up before it draws
        place["counter"] = np.array([group % CHUNK * _blocks(candidates), group // CHUNK, 0, 0], dtype=np.uint64)
        place["key"] = np.asarray(key, np.uint64)
        self.bits.state = self.state  # with no word left over: buffer_pos is at its end
        return self.bits


_stream = _Stream()


def _blocks(candidates: int) -> int:
    return -(-candidates // _WORDS)


def _draw(stream: np.random.Philox, out: np.ndarray) -> None:
    candidates, groups = out.shape
    width = _blocks(candidates) * _WORDS
    words = stream.random_raw(groups * width // 2).astype("<u8", copy=False).view("<u4")
    # As the mantissa of a float in [1, 2), t gives 1 + t·2⁻²³; what is taken off leaves (t + ½)·2⁻²³ exactly.
    np.right_shift(words, 9, out=words)
    np.bitwise_or(words, _ONE, out=words)
    rows = words.view("<f4").reshape(groups, width)
    for k, row in enumerate(out):
        np.subtract(rows[:, k], _OFFSET, out=row)
