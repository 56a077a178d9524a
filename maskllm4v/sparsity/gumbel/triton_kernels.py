"""Triton kernels of the 2:4 mask operation and of its noise. :mod:`maskllm4v.sparsity.gumbel.triton_op` launches them.

Arithmetic counts here: a group's Philox block and its six logarithms cost more instructions than all else, so that
only a lean kernel waits for memory. The six candidates keep the weights (01)(02)(03)(12)(13)(23) of a group.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import math

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from maskllm4v.utils.rng import CHUNK

_CHUNK = tl.constexpr(CHUNK)
# Philox4x64: two multipliers, and what is added to the two halves of the key after every round.
_MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)
_MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
_WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
_WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)
_SCALE = tl.constexpr(2.0**24)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LARGEST_UNIFORM = tl.constexpr(1 - 2.0**-24)
_SMALLEST_UNIFORM = tl.constexpr(2.0**-126)


@triton.jit
def _philox(group, blocks, block, key0, key1):
    """Philox4x64-10 of the counter (1 + g·blocks + block, chunk, 0, 0), g within its chunk: four uint64 words."""
    c0 = 1 + (group % _CHUNK).to(tl.uint64) * blocks + block
    c1 = (group // _CHUNK).to(tl.uint64)
    c2 = c0 * 0
    c3 = c2
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, _MULTIPLIER_0)
        high1 = tl.umulhi(c2, _MULTIPLIER_1)
        low0 = c0 * _MULTIPLIER_0
        low1 = c2 * _MULTIPLIER_1
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + _WEYL_0
        key1 = key1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """(t + ½)·2⁻²³ of a 32-bit word's top 23 bits t, exactly: 1 + t·2⁻²³ is t behind the exponent of 1."""
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-24)


@triton.jit
def _uniforms(word):
    """Of the low and of the high half of a 64-bit word."""
    return _uniform(word.to(tl.uint32)), _uniform((word >> 32).to(tl.uint32))


@triton.jit
def _log(x):
    """Natural logarithm of normal x > 0, to 1.5·2⁻²⁴ of its value below 1, even next to it, and 1.8·2⁻²⁴ above.

    As −log u goes into another logarithm or a quotient, its relative error counts; the hardware's is large near 1.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23  # of x/m with m in [2/3, 4/3)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # Minimax: log(1 + f) = f + f²·q(f), of least relative error.
    q = tl.fma(f, 0.14026358723640442, -0.1538853943347931)
    q = tl.fma(q, f, 0.13995806872844696)
    q = tl.fma(q, f, -0.1641596108675003)
    q = tl.fma(q, f, 0.20011168718338013)
    q = tl.fma(q, f, -0.2500782012939453)
    q = tl.fma(q, f, 0.33333197236061096)
    q = tl.fma(q, f, -0.49999937415122986)
    return tl.fma(exponent.to(tl.float32), 0.6931471805599453, tl.fma(f * f, q, f))


@triton.jit
def _given(uniform, inside):
    """Noise to be used as it is, kept where it and its logarithm are normal numbers."""
    u = tl.load(uniform, inside, 0.5).to(tl.float32)
    return tl.minimum(tl.maximum(u, _SMALLEST_UNIFORM), _LARGEST_UNIFORM)


@triton.jit
def _exponentials(uniform, groups, start, first, lane, inside, key0, key1, NOISE: tl.constexpr):
    """E_k = −log u_k of the six candidates; drawn noise counts groups from the layer's ``first`` one on."""
    if NOISE == "drawn":
        x0, x1, x2, _ = _philox(start - first + lane, 1, 0, key0.to(tl.uint64), key1.to(tl.uint64))
        u0, u1 = _uniforms(x0)
        u2, u3 = _uniforms(x1)
        u4, u5 = _uniforms(x2)
    else:
        row = uniform + start + lane
        u0 = _given(row, inside)
        u1 = _given(row + groups, inside)
        u2 = _given(row + 2 * groups, inside)
        u3 = _given(row + 3 * groups, inside)
        u4 = _given(row + 4 * groups, inside)
        u5 = _given(row + 5 * groups, inside)
    return -_log(u0), -_log(u1), -_log(u2), -_log(u3), -_log(u4), -_log(u5)


@triton.jit
def _largest(z0, z1, z2, z3, z4, z5):
    return tl.maximum(tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)), tl.maximum(z4, z5))


@triton.jit
def _place(layers, keys, groups, key0, key1, JOINED: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program: its first group, how many from there on are its layer's, the layer's first group, and its key.

    Joined layers have the first two and the number of the layer in ``layers`` ``[programs, 3]``, and in ``keys``
    ``[layers, 3]`` their first group and the key.
    """
    program = tl.program_id(0)
    if JOINED:
        start = tl.load(layers + 3 * program)
        count = tl.load(layers + 3 * program + 1)
        layer = tl.load(layers + 3 * program + 2)
        first = tl.load(keys + 3 * layer)
        key0 = tl.load(keys + 3 * layer + 1).to(tl.uint64, bitcast=True)
        key1 = tl.load(keys + 3 * layer + 2).to(tl.uint64, bitcast=True)
    else:
        start = tl.cast(program, tl.int64) * BLOCK  # 6·groups may exceed 2³¹
        count = tl.cast(groups, tl.int64) - start
        first = start * 0
    return start, count, first, key0, key1


@triton.jit
def _scores(logits, uniform, groups, start, first, lane, inside, key0, key1, scaling, inverse_tau, NOISE: tl.constexpr):
    """The six candidates' probabilities up to their common factor: exp((s·l_k − log E_k)/τ)."""
    row = logits + start + lane
    z0 = tl.load(row, inside, 0.0).to(tl.float32)
    z1 = tl.load(row + groups, inside, 0.0).to(tl.float32)
    z2 = tl.load(row + 2 * groups, inside, 0.0).to(tl.float32)
    z3 = tl.load(row + 3 * groups, inside, 0.0).to(tl.float32)
    z4 = tl.load(row + 4 * groups, inside, 0.0).to(tl.float32)
    z5 = tl.load(row + 5 * groups, inside, 0.0).to(tl.float32)
    # Differences first: s·l would round at the size of s·l, and only what is near the largest counts.
    top = _largest(z0, z1, z2, z3, z4, z5)
    z0 -= top
    z1 -= top
    z2 -= top
    z3 -= top
    z4 -= top
    z5 -= top
    rate = scaling * inverse_tau * _LOG2_E
    if NOISE == "none":
        z0 = tl.exp2(rate * z0)
        z1 = tl.exp2(rate * z1)
        z2 = tl.exp2(rate * z2)
        z3 = tl.exp2(rate * z3)
        z4 = tl.exp2(rate * z4)
        z5 = tl.exp2(rate * z5)
    else:
        e0, e1, e2, e3, e4, e5 = _exponentials(uniform, groups, start, first, lane, inside, key0, key1, NOISE)
        if inverse_tau == 1.0:
            # exp(−log E_k) = 1/E_k, all times the product of the six: no second logarithm and no division.
            # As 2⁻²⁴ < E < 88, products of five lie between 2⁻¹²⁰ and 2³³: scaled, far from either end.
            e01 = e0 * e1
            e23 = e2 * e3
            e45 = e4 * e5
            rest = e23 * e45 * _SCALE
            z0 = tl.exp2(rate * z0) * (e1 * rest)
            z1 = tl.exp2(rate * z1) * (e0 * rest)
            rest = e01 * e45 * _SCALE
            z2 = tl.exp2(rate * z2) * (e3 * rest)
            z3 = tl.exp2(rate * z3) * (e2 * rest)
            rest = e01 * e23 * _SCALE
            z4 = tl.exp2(rate * z4) * (e5 * rest)
            z5 = tl.exp2(rate * z5) * (e4 * rest)
        else:
            z0 = (scaling * z0 - _log(e0)) * inverse_tau
            z1 = (scaling * z1 - _log(e1)) * inverse_tau
            z2 = (scaling * z2 - _log(e2)) * inverse_tau
            z3 = (scaling * z3 - _log(e3)) * inverse_tau
            z4 = (scaling * z4 - _log(e4)) * inverse_tau
            z5 = (scaling * z5 - _log(e5)) * inverse_tau
            top = _largest(z0, z1, z2, z3, z4, z5)
            z0 = tl.exp2((z0 - top) * _LOG2_E)
            z1 = tl.exp2((z1 - top) * _LOG2_E)
            z2 = tl.exp2((z2 - top) * _LOG2_E)
            z3 = tl.exp2((z3 - top) * _LOG2_E)
            z4 = tl.exp2((z4 - top) * _LOG2_E)
            z5 = tl.exp2((z5 - top) * _LOG2_E)
    return z0, z1, z2, z3, z4, z5


@triton.jit
def _flat(m0, m1, m2, m3, BLOCK: tl.constexpr):
    """Four columns as the rows lie in memory, ``[4 * BLOCK]``."""
    return tl.reshape(tl.join(tl.join(m0, m2), tl.join(m1, m3)), [4 * BLOCK])


@triton.jit
def _columns(x, BLOCK: tl.constexpr):
    """The reverse of :func:`_flat`."""
    even, odd = tl.split(tl.reshape(x, [BLOCK, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _chosen(p0, p1, p2, p3, p4, p5, BLOCK: tl.constexpr):
    """The mask of the most probable candidate, the first of equal ones, ``[4 * BLOCK]``."""
    best = p0
    kept = tl.where(p1 > best, 0b0101, 0b0011)  # bit j: weight j is kept
    best = tl.maximum(p1, best)
    kept = tl.where(p2 > best, 0b1001, kept)
    best = tl.maximum(p2, best)
    kept = tl.where(p3 > best, 0b0110, kept)
    best = tl.maximum(p3, best)
    kept = tl.where(p4 > best, 0b1010, kept)
    best = tl.maximum(p4, best)
    kept = tl.where(p5 > best, 0b1100, kept)
    return _flat(kept & 1, (kept >> 1) & 1, (kept >> 2) & 1, kept >> 3, BLOCK).to(tl.float32)


# A new value of these compiles nothing: no special case for 1 or multiples of 16, and by their types none for size.
_RUNTIME_VALUES = ["groups", "key0", "key1", "scaling", "inverse_tau"]


@triton.jit(do_not_specialize=_RUNTIME_VALUES)
def masked_weight_forward(
    weight,
    logits,
    uniform,
    masked,
    energies,
    groups: tl.int64,
    key0: tl.uint64,
    key1: tl.uint64,
    scaling,
    inverse_tau,
    layers,
    keys,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    JOINED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Masked weights ``[groups, 4]``, and the sum of their squares for each program."""
    start, count, first, key0, key1 = _place(layers, keys, groups, key0, key1, JOINED, BLOCK)
    groups = tl.cast(groups, tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    p0, p1, p2, p3, p4, p5 = _scores(
        logits, uniform, groups, start, first, lane, inside, key0, key1, scaling, inverse_tau, NOISE
    )
    if HARD:
        mask = _chosen(p0, p1, p2, p3, p4, p5, BLOCK)
    else:
        m0 = p0 + p1 + p2
        m3 = p2 + p4 + p5
        rate = 1.0 / (m0 + (p3 + p4 + p5))
        mask = _flat(m0 * rate, (p0 + p3 + p4) * rate, (p1 + p3 + p5) * rate, m3 * rate, BLOCK)
    element = tl.arange(0, 4 * BLOCK)
    present = element < 4 * count
    x = mask * tl.load(weight + 4 * start + element, present, 0.0).to(tl.float32)
    tl.store(masked + 4 * start + element, x.to(masked.dtype.element_ty), present)
    tl.store(energies + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit(do_not_specialize=_RUNTIME_VALUES)
def masked_weight_backward(
    weight,
    logits,
    uniform,
    grad_masked,
    grad_energy,
    grad_logits,
    grad_weight,
    groups: tl.int64,
    key0: tl.uint64,
    key1: tl.uint64,
    scaling,
    inverse_tau,
    layers,
    keys,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    JOINED: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the logits, (s/τ)·p_k·(Σ_j S_kj q_j − Σ_j m_j q_j), and of the weights."""
    start, count, first, key0, key1 = _place(layers, keys, groups, key0, key1, JOINED, BLOCK)
    groups = tl.cast(groups, tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    p0, p1, p2, p3, p4, p5 = _scores(
        logits, uniform, groups, start, first, lane, inside, key0, key1, scaling, inverse_tau, NOISE
    )
    rate = 1.0 / (p0 + p1 + p2 + (p3 + p4 + p5))
    m0 = (p0 + p1 + p2) * rate
    m1 = (p0 + p3 + p4) * rate
    m2 = (p1 + p3 + p5) * rate
    m3 = (p2 + p4 + p5) * rate
    mask = _chosen(p0, p1, p2, p3, p4, p5, BLOCK) if HARD else _flat(m0, m1, m2, m3, BLOCK)
    element = tl.arange(0, 4 * BLOCK)
    present = element < 4 * count
    w = tl.load(weight + 4 * start + element, present, 0.0).to(tl.float32)
    upstream = tl.load(grad_masked + 4 * start + element, present, 0.0).to(tl.float32)
    upstream += 2.0 * tl.load(grad_energy).to(tl.float32) * (w * mask)
    if WEIGHT_GRAD:
        g = upstream * mask
        tl.store(grad_weight + 4 * start + element, g.to(grad_weight.dtype.element_ty), present)
    q0, q1, q2, q3 = _columns(upstream * w, BLOCK)
    mean = m0 * q0 + m1 * q1 + m2 * q2 + m3 * q3
    rate *= scaling * inverse_tau
    row = grad_logits + start + lane
    kind = grad_logits.dtype.element_ty
    tl.store(row, (rate * p0 * (q0 + q1 - mean)).to(kind), inside)
    tl.store(row + groups, (rate * p1 * (q0 + q2 - mean)).to(kind), inside)
    tl.store(row + 2 * groups, (rate * p2 * (q0 + q3 - mean)).to(kind), inside)
    tl.store(row + 3 * groups, (rate * p3 * (q1 + q2 - mean)).to(kind), inside)
    tl.store(row + 4 * groups, (rate * p4 * (q1 + q3 - mean)).to(kind), inside)
    tl.store(row + 5 * groups, (rate * p5 * (q2 + q3 - mean)).to(kind), inside)


@triton.jit(do_not_specialize=["candidates", "blocks", "groups", "first", "key0", "key1"])
def philox_uniforms(
    noise,
    candidates,
    blocks,
    groups: tl.int64,
    first: tl.int64,
    key0: tl.uint64,
    key1: tl.uint64,
    BLOCK: tl.constexpr,
):
    """Noise ``[candidates, groups]`` of the groups from ``first`` on; a program draws one of a group's blocks."""
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    block = tl.program_id(1)
    groups = tl.cast(groups, tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < groups - start
    x0, x1, x2, x3 = _philox(start + lane + first, blocks, block, key0.to(tl.uint64), key1.to(tl.uint64))
    u0, u1 = _uniforms(x0)
    u2, u3 = _uniforms(x1)
    u4, u5 = _uniforms(x2)
    u6, u7 = _uniforms(x3)
    position = block * 8 * groups + start + lane
    end = candidates * groups
    tl.store(noise + position, u0, inside)
    tl.store(noise + position + groups, u1, inside & (position + groups < end))
    tl.store(noise + position + 2 * groups, u2, inside & (position + 2 * groups < end))
    tl.store(noise + position + 3 * groups, u3, inside & (position + 3 * groups < end))
    tl.store(noise + position + 4 * groups, u4, inside & (position + 4 * groups < end))
    tl.store(noise + position + 5 * groups, u5, inside & (position + 5 * groups < end))
    tl.store(noise + position + 6 * groups, u6, inside & (position + 6 * groups < end))
    tl.store(noise + position + 7 * groups, u7, inside & (position + 7 * groups < end))
