"""What the mask operation, a training step and a pruning have to do at least, against what the device can do.

The 2:4 mask operation is counted by hand, a group of 4 weights with its 6 logits, in float32, forward and backward
once each, noise drawn in both; a step's matrix products by PyTorch; pruning by the formulas below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Ceilings, Timing, ceilings
from benchmarks.results import Row
from maskllm4v.sparsity.patterns import NMPattern

GROUP = NMPattern("2:4").m

# Memory, with everything read and written once: forward reads 6 logits and 4 weights and writes 4 masked weights;
# backward reads 6 logits, 4 weights and 4 gradients from above and writes 6 gradients. Noise, probabilities and
# mask stay in registers or cache.
BYTES = 4 * ((6 + 4 + 4) + (6 + 4 + 4 + 6))

# Noise is one block of Philox4x64-10 a group and pass, 8 words of which 6 are used: 10 rounds of two 64×64-bit
# products, high and low half (4), four exclusive ors, and two additions to the key; then shift, or, subtract for
# each of 6 words. 64-bit operations for the block: a GPU's 32-bit units need several for one.
INTEGER = 2 * (10 * (4 + 4 + 2) + 6 * 3)

# Exponentials and logarithms, in each pass: with τ = 1, exp(s·l) / −log u, 6 of either; else −log(−log u) and exp.
SPECIAL = {True: 2 * (6 + 6), False: 2 * (12 + 6)}

# Floating-point operations, divisions as one. Probabilities, in each pass: ·s 6, maximum 5, − maximum 6, noise 6
# (and /τ 6 in the general form), sum 5, / sum 6. Mask, in each pass: three differences 3, sums 4, four values 4,
# ½ 4, · w 4. Regulariser forward: squares and sum 8. Backward: gradient + 2λ'·wm 8, · w 4, six pair sums 6,
# Σ p·t 11, t − Σ 6, · p 6, · s/τ 6.
_PROBABILITIES, _MASK = 6 + 5 + 6 + 6 + 5 + 6, 3 + 4 + 4 + 4 + 4
FLOATING = {
    True: 2 * (_PROBABILITIES + _MASK) + 8 + (8 + 4 + 6 + 11 + 6 + 6 + 6),
    False: 2 * (_PROBABILITIES + 6 + _MASK) + 8 + (8 + 4 + 6 + 11 + 6 + 6 + 6),
}

NOTES = [
    f"roofline, a group of 4 weights: {BYTES} bytes, {SPECIAL[True]} exponentials and logarithms at τ = 1"
    f" ({SPECIAL[False]} else), {FLOATING[True]} ({FLOATING[False]}) floating-point and {INTEGER} 64-bit integer"
    " operations (benchmarks/roofline.py counts them); share: the largest of memory_ms, special_ms and floating_ms,"
    " the least that bytes, exponentials and logarithms, and floating-point operations take at the ceilings measured"
    " here, of the time measured. Integer operations have no measured ceiling and are left out of it.",
]


def rows(weights: int, times: Mapping[str, Timing], tau: float, device: torch.device, *, quick: bool) -> list[Row]:
    """A row a candidate: least times by the device's ceilings, in ms, and the share of them that it reaches.

    Args:
        weights: of the layer that was timed.
        times: by candidate.
        tau: temperature; at 1 there is less to do.
        device: ceilings are measured here, with the threads set now.
        quick: measure them on tiny arrays.
    """
    found, groups = ceilings(device, quick=quick), weights / GROUP
    least = least_seconds(found, groups, tau)
    return [
        {
            "threads": torch.get_num_threads(),
            "tau": tau,
            "candidate": name,
            "n": time.n,
            "ms": 1e3 * time.median,
            **{f"{what}_ms": 1e3 * seconds for what, seconds in least.items()},
            "share": max(least.values()) / time.median,
            "gb_a_second": found.bandwidth / 1e9,
            "fp32_gflops": found.fp32 / 1e9,
            "special_g_a_second": found.special / 1e9,
        }
        for name, time in times.items()
    ]


def least_seconds(found: Ceilings, groups: float, tau: float) -> dict[str, float]:
    """The least time that each kind of work takes on its own."""
    return {
        "memory": groups * BYTES / found.bandwidth,
        "special": groups * SPECIAL[tau == 1] / found.special,
        "floating": groups * FLOATING[tau == 1] / found.fp32,
    }


# Fused AdamW reads parameter, gradient and two moments and writes all but the gradient, in float32: bytes each.
ADAMW = 4 * (4 + 3)


def step_row(
    call: Callable[[], Any], time: Timing, found: Ceilings, *, trained: int, masked: int, precision: str
) -> Row:
    """A training step: its matrix products and attention, and the memory that only its size in weights asks for.

    Args:
        call: the step.
        time: what it took.
        found: ceilings, ``bf16`` among them where that is the precision.
        trained: parameters that AdamW updates.
        masked: weights under a learned mask; 0 for a dense step.
        precision: ``"bf16"`` or ``"fp32"``.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    flop = counter.get_total_flops()
    size = ADAMW * trained + BYTES * masked / GROUP
    return _shares(flop, found.bf16 if precision == "bf16" else found.fp32, size, found.bandwidth, time)


def pruning_row(linears: Iterable[nn.Linear], method: str, tokens: int, time: Timing, found: Ceilings) -> Row:
    """One-shot pruning of a chain of blocks: forward passes, Hessians, factors, updates, all in float32.

    A pass of ``tokens`` rows through a layer takes 2·out·in·tokens operations; SparseGPT makes two, since later layers
    see pruned ones. A Hessian takes in²·tokens, being symmetric; its Cholesky factor in³/3, the inverse of that as
    much again, and the update out·in². Attention and element-wise work are left out. Bytes: each weight is read and
    its mask written.
    """
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    weights = sum(out * width for out, width in shapes)
    flop = 0.0
    if method != "magnitude":
        flop += 2 * weights * tokens * (2 if method.startswith("sparsegpt") else 1)
    if method.startswith("sparsegpt"):
        flop += sum(width**2 * tokens + width**3 / 3 for _, width in shapes)
    if method == "sparsegpt, update":
        flop += sum(width**3 / 3 + out * width**2 for out, width in shapes)
    return _shares(flop, found.fp32, 5 * weights, found.bandwidth, time)


def _shares(flop: float, peak: float, size: float, bandwidth: float, time: Timing) -> Row:
    least = {"products_s": flop / peak, "memory_s": size / bandwidth}
    return {
        "n": time.n,
        "gflop": flop / 1e9,
        "gb": size / 1e9,
        **least,
        "s": time.median,
        "share": sum(least.values()) / time.median,
        "gflops_peak": peak / 1e9,
        "gb_a_second": bandwidth / 1e9,
    }
