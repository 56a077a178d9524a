"""The packed layout against an oracle written apart, and files that hold it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskllm4v.checkpoints.packed import mask_of, pack_weight, position_bits, unpack_weight
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import PatternError

PATTERNS = ["2:4", "1:4", "3:4", "1:2", "2:8", "4:8", "1:3", "2:5", "1:16", "7:8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8]


def folded(rows: int, groups: int, pattern: NMPattern, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, groups * pattern.m, generator=draw) * 10).to(dtype)
    mask = pattern.topn_mask(torch.rand(weight.shape, generator=draw))
    return weight.masked_fill(~mask, 0), mask


def positions_by_hand(mask: Tensor, pattern: NMPattern) -> list[bytes]:
    """Row by row: each kept place's bits, lowest first, as one long number."""
    bits, found = math.ceil(math.log2(pattern.m)), []
    for row in mask.tolist():
        places = [i % pattern.m for i, kept in enumerate(row) if kept]
        number = sum(place << (bits * i) for i, place in enumerate(places))
        found.append(number.to_bytes(math.ceil(bits * len(places) / 8), "little"))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (1, 7), (5, 3), (16, 8)])
def test_round_trip(text: str, rows: int, groups: int, dtype: torch.dtype) -> None:
    pattern = NMPattern(text)
    weight, mask = folded(rows, groups, pattern, dtype, seed=rows)
    values, positions = pack_weight(weight, mask, pattern)
    assert values.shape == (rows, groups * pattern.n)
    assert [bytes(row.tolist()) for row in positions] == positions_by_hand(mask, pattern)
    back, kept = unpack_weight(values, positions, pattern)
    assert back.dtype == dtype
    assert torch.equal(back, weight)
    assert torch.equal(kept, mask)


@given(st.data())
def test_any_pattern_and_shape(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 8))
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    weight, mask = folded(rows, groups, pattern, torch.float32, seed=data.draw(st.integers(0, 99)))
    back, kept = unpack_weight(*pack_weight(weight, mask, pattern), pattern)
    assert torch.equal(back, weight)
    assert torch.equal(kept, mask)


def test_special_values_keep_their_bits() -> None:
    pattern, kept = NMPattern("2:4"), torch.tensor([[True, False, True, False]])
    for value in (float("inf"), float("-inf"), float("nan"), -0.0, 1e-45):
        weight = torch.tensor([[value, 0.0, 0.0, 0.0]])
        back, mask = unpack_weight(*pack_weight(weight, kept, pattern), pattern)
        assert torch.equal(back.view(torch.int32), weight.view(torch.int32))
        assert torch.equal(mask, kept)  # a kept weight that happens to be zero is still a kept one


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.53125), (torch.float16, 0.5625)])
def test_size_of_2_of_4(dtype: torch.dtype, share: float) -> None:
    weight, mask = folded(64, 32, NMPattern("2:4"), dtype, seed=0)
    assert position_bits(NMPattern("2:4")) == 2
    packed = sum(part.nbytes for part in pack_weight(weight, mask, NMPattern("2:4")))
    assert packed == share * weight.nbytes


def test_weights_that_cannot_be_packed() -> None:
    pattern = NMPattern("2:4")
    weight, mask = folded(3, 2, pattern, torch.float32, seed=0)
    broken = weight.clone()
    broken[~mask] = 1e-30
    for case, text in [
        ((broken, mask), "layer 'fc1': the weight is not zero where its mask is"),
        ((weight[:2], mask), r"layer 'fc1': mask \(3, 8\) for a weight \(2, 8\)"),
        ((weight, torch.ones_like(mask)), "layer 'fc1': group 0 of row 0 keeps 4 of 4"),
    ]:
        with pytest.raises(PatternError, match=text):
            pack_weight(*case, pattern, "fc1")


def test_positions_that_belong_to_no_weight() -> None:
    pattern = NMPattern("2:4")
    values, positions = pack_weight(*folded(3, 2, pattern, torch.float32, seed=0), pattern)
    same, falling = positions.clone(), positions.clone()
    same[1, 0], falling[2, 0] = 0b0000, 0b0001  # places 0, 0 and 1, 0
    for case, text in [
        ((values, same), "do not rise"),
        ((values, falling), "do not rise"),
        ((values, positions[:, :0]), "3x4 values of 2:4 go with 3x1 bytes of positions, found 3x0"),
        ((values, positions.int()), "found 3x1 of torch.int32"),
        ((values[:, :3], positions), "3x3 values"),
        ((values[0], positions), "1 dimensions"),
    ]:
        with pytest.raises(PatternError, match=text):
            unpack_weight(*case, pattern, "fc1")
    with pytest.raises(PatternError, match="from 0 to 4"):  # 3 bits could name eight places, there are five
        unpack_weight(torch.ones(1, 1), torch.tensor([[7]], dtype=torch.uint8), NMPattern("1:5"))


@pytest.mark.parametrize("text", PATTERNS)
def test_mask_of_zeros(text: str) -> None:
    pattern = NMPattern(text)
    weight, mask = folded(6, 5, pattern, torch.float32, seed=1)
    weight[0] = 0
    found = mask_of(weight, pattern)
    assert pattern.is_valid(found)
    assert not weight[~found].any()
    assert torch.equal(found[1:], mask[1:])
    weight[2, : pattern.m] = 1
    with pytest.raises(PatternError, match=f"layer 'fc1': group 0 of row 2 has more than {pattern.n}"):
        mask_of(weight, pattern, "fc1")
