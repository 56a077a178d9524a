"""Noise of any range of groups, in NumPy and in PyTorch, is that of its chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from mask_oracle import Case

from maskllm4v.sparsity.gumbel.philox import uniforms_of
from maskllm4v.utils.rng import CHUNK, fill_uniforms, philox_key, uniforms

KEY = philox_key(3, "noise")
every_pattern = pytest.mark.parametrize("candidates", [4, 6, 28, 70])  # 1, 1, 4 and 9 Philox blocks a group
# Within a chunk, up to its end, across it, over a whole one, far away.
RANGES = [(0, 20), (37, 20), (CHUNK - 20, 20), (CHUNK - 5, 12), (CHUNK, 7), (CHUNK - 1, CHUNK + 2), (2**21 - 3, 9)]
every_range = pytest.mark.parametrize(("first", "groups"), RANGES)


def by_chunks(candidates: int, first: int, groups: int) -> torch.Tensor:
    chunks = range(first // CHUNK, (first + groups - 1) // CHUNK + 1)
    start = first - chunks[0] * CHUNK
    return torch.cat([uniforms(KEY, chunk, candidates, CHUNK) for chunk in chunks], 1)[:, start : start + groups]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@every_pattern
@every_range
@pytest.mark.usefixtures("threads")
def test_ranges_are_cut_from_chunks(candidates: int, first: int, groups: int) -> None:
    out = torch.full((candidates, groups), torch.nan)
    fill_uniforms(out, KEY, first)
    assert torch.equal(out, by_chunks(candidates, first, groups))


@pytest.mark.usefixtures("threads")
def test_nothing_is_written_beside_a_range() -> None:
    room = torch.full((6, CHUNK + 40), torch.nan)
    fill_uniforms(room[:, 7:-8], KEY, 11)
    assert torch.equal(room[:, 7:-8], by_chunks(6, 11, CHUNK + 25))
    assert room[:, :7].isnan().all()
    assert room[:, -8:].isnan().all()
    columns = torch.full((2 * CHUNK, 12), torch.nan).t()[::2]
    fill_uniforms(columns, KEY, CHUNK - 9)
    assert torch.equal(columns, by_chunks(6, CHUNK - 9, 2 * CHUNK))


@pytest.mark.usefixtures("threads")
def test_an_empty_range() -> None:
    fill_uniforms(torch.empty(6, 0), KEY, CHUNK)


def in_pytorch(key: np.ndarray, candidates: int, first: int, groups: int) -> torch.Tensor:
    found = uniforms_of(torch.from_numpy(key.view(np.int64)), torch.tensor(first), groups, candidates)
    assert all(row.dtype is torch.float32 for row in found)
    return torch.stack(found)


@every_pattern
@every_range
def test_pytorch_draws_the_same(candidates: int, first: int, groups: int) -> None:
    assert torch.equal(in_pytorch(KEY, candidates, first, groups), by_chunks(candidates, first, groups))


@pytest.mark.parametrize("half", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_pytorch_takes_every_size_of_key(half: int) -> None:
    for words in ((half, 5), (5, half)):
        key = np.array(words, np.uint64)
        assert torch.equal(in_pytorch(key, 6, 0, 50), uniforms(key, 0, 6, 50))


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_default_type_does_not_count(default: torch.dtype) -> None:
    case = Case(dtype=torch.float32)
    expected = case.drawn("chunked", torch.float32, tau=1.0, scaling=10.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(uniforms(case.key, 0, 6, 30), case.uniform)
        found = case.drawn("chunked", torch.float32, tau=1.0, scaling=10.0)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
