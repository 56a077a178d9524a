"""Masks of N:M patterns: whether they are valid, their candidates' indices, and their packed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import SHAPES, kept_positions, nm
from torch import Tensor

from maskllm4v import NMPattern
from maskllm4v.utils.errors import PatternError


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, int, list[int], Tensor]:
    """N, M, the candidate index of every group, and the mask."""
    n, m = draw(nm)
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    candidates = list(itertools.combinations(range(m), n))
    size = rows * groups
    index = draw(st.lists(st.integers(0, len(candidates) - 1), min_size=size, max_size=size))
    bits = [[j in candidates[k] for j in range(m)] for k in index]
    return n, m, index, torch.tensor(bits).reshape(rows, groups * m)


@given(masks())
def test_valid_masks(case: tuple[int, int, list[int], Tensor]) -> None:
    n, m, _, mask = case
    for dtype in (torch.bool, torch.uint8, torch.float32):
        assert NMPattern(n, m).is_valid(mask.to(dtype))
        NMPattern(n, m).validate(mask.to(dtype))


@given(masks(), st.data())
def test_one_flip_invalidates(case: tuple[int, int, list[int], Tensor], data: st.DataObject) -> None:
    n, m, _, mask = case
    row, column = (data.draw(st.integers(0, size - 1)) for size in mask.shape)
    mask[row, column] = ~mask[row, column]
    count = n + 1 if mask[row, column] else n - 1
    assert not NMPattern(n, m).is_valid(mask)
    with pytest.raises(PatternError, match=f"group {column // m} of row {row} keeps {count} of {m} weights, not {n}"):
        NMPattern(n, m).validate(mask)


def test_validate_names_layer_and_first_fault() -> None:
    mask = torch.tensor([[1, 1, 0, 0] * 3] * 4, dtype=torch.bool)
    mask[3, 0] = mask[2, 6] = True
    mask[3, 1] = False
    with pytest.raises(PatternError, match=r"'fc1': group 1 of row 2 keeps 3 of 4 weights, not 2"):
        NMPattern("2:4").validate(mask, "fc1")


@pytest.mark.parametrize("value", [2.0, 0.5, -1.0, math.nan])
def test_validate_refuses_other_values(value: float) -> None:
    mask = torch.tensor([[value, 2 - value, 0.0, 0.0]])
    assert not NMPattern("2:4").is_valid(mask)
    with pytest.raises(PatternError, match=r"'fc1'.*other than 0 and 1"):
        NMPattern("2:4").validate(mask, "fc1")


def test_misfit_is_not_valid() -> None:
    assert not NMPattern("2:4").is_valid(torch.ones(2, 6, dtype=torch.bool))


@given(masks())
def test_similarity(case: tuple[int, int, list[int], Tensor]) -> None:
    n, m, _, mask = case
    found = NMPattern(n, m).similarity(mask)
    shared = [
        [len(set(candidate) & set(kept)) for kept in kept_positions(mask, m)]
        for candidate in itertools.combinations(range(m), n)
    ]
    assert found.dtype is torch.float32
    assert found.tolist() == shared


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_mean_similarity(n: int, m: int) -> None:
    pattern = NMPattern(n, m)
    mask = pattern.topn_mask(torch.randn(3, 4 * m))
    assert pattern.similarity(mask).mean(0).tolist() == pytest.approx([n * n / m] * 12, rel=1e-5)


@given(masks())
def test_index_round_trip(case: tuple[int, int, list[int], Tensor]) -> None:
    n, m, index, mask = case
    pattern = NMPattern(n, m)
    assert pattern.to_index(mask).tolist() == index
    assert torch.equal(pattern.from_index(torch.tensor(index), mask.shape), mask)


def test_to_index_refuses_invalid_mask() -> None:
    with pytest.raises(PatternError, match="'fc1'"):
        NMPattern("2:4").to_index(torch.ones(2, 4, dtype=torch.bool), "fc1")


@given(masks())
def test_pack_layout_and_round_trip(case: tuple[int, int, list[int], Tensor]) -> None:
    n, m, index, mask = case
    pattern = NMPattern(n, m)
    packed = pattern.pack(mask)
    number = sum(k << (i * pattern.bits) for i, k in enumerate(index))
    size = math.ceil(len(index) * pattern.bits / 8)
    assert packed.dtype is torch.uint8
    assert bytes(packed.tolist()) == number.to_bytes(size, "little")
    assert torch.equal(pattern.unpack(packed, mask.shape), mask)


def test_packed_2_4_takes_three_bits_a_group() -> None:
    pattern = NMPattern("2:4")
    mask = pattern.topn_mask(torch.randn(16, 64))
    assert pattern.pack(mask).numel() == 16 * 64 * 3 // 4 // 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p[:-1],
        lambda p: torch.cat([p, p[:1]]),
        lambda p: p[:0],
        lambda p: p.to(torch.int32),
        lambda p: p.to(torch.float32),
        lambda p: p.view(torch.int8),
        lambda p: p.reshape(1, -1),
        lambda p: torch.full_like(p, 0xFF),
    ],
    ids=["short", "long", "empty", "int32", "float32", "int8", "2-d", "index"],
)
def test_damaged_bytes_are_refused(damage: object) -> None:
    pattern = NMPattern("2:4")
    mask = pattern.topn_mask(torch.randn(5, 12))
    packed = damage(pattern.pack(mask))
    with pytest.raises(PatternError, match="'fc1'"):
        pattern.unpack(packed, mask.shape, "fc1")


@pytest.mark.parametrize("at", range(15))
def test_index_out_of_range_is_found_anywhere(at: int) -> None:
    pattern = NMPattern("2:4")
    number = 6 << (3 * at)  # 15 groups; one names candidate 6 of 0..5
    packed = torch.tensor(list(number.to_bytes(6, "little")), dtype=torch.uint8)
    with pytest.raises(PatternError, match="candidate 6"):
        pattern.unpack(packed, (5, 12))
