"""The noise against Philox written down from its paper."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskllm4v.utils.rng import CHUNK, generator, philox_key, torch_seed, uniforms

WORD = 2**64 - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds of Philox4x64 (Salmon et al. 2011, section 3.3 and Random123's constants)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & WORD, (first >> 64) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [c0, c1, c2, c3]


def uniform_by_hand(key: list[int], chunk: int, candidates: int, group: int) -> list[float]:
    blocks = math.ceil(candidates / 8)
    words = []
    for b in range(blocks):
        for output in philox4x64([1 + group * blocks + b, chunk, 0, 0], key):
            words += [output & 0xFFFFFFFF, output >> 32]
    return [((word >> 9) + 0.5) * 2.0**-23 for word in words[:candidates]]


def test_oracle_gives_the_published_answers() -> None:
    # kat_vectors of Random123
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox4x64([WORD] * 4, [WORD] * 2) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("candidates", [2, 4, 6, 8, 9, 28, 70])
@pytest.mark.parametrize("chunk", [0, 1, 1000])
def test_uniforms_are_philox(candidates: int, chunk: int) -> None:
    key = philox_key(7, "gumbel", "blocks.0.attn.qkv", 3)
    found = uniforms(key, chunk, candidates, 40)
    assert found.dtype is torch.float32
    assert found.shape == (candidates, 40)
    for group in (0, 1, 2, 38, 39):
        assert found[:, group].tolist() == uniform_by_hand([int(k) for k in key], chunk, candidates, group)


def test_last_group_of_a_full_chunk_is_philox() -> None:
    key = philox_key(7)
    found = uniforms(key, 3, 6, CHUNK)
    assert found[:, -1].tolist() == uniform_by_hand([int(k) for k in key], 3, 6, CHUNK - 1)


@pytest.mark.parametrize(("word", "expected"), [(0, 2.0**-24), (WORD, 1 - 2.0**-24)])
def test_extreme_words_stay_inside(word: int, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def at(self, *_: object) -> Stuck:
            return self

        def random_raw(self, size: int) -> np.ndarray:
            return np.full(size, word, dtype=np.uint64)

    monkeypatch.setattr("maskllm4v.utils.rng._stream", Stuck())
    found = uniforms(philox_key(0), 0, 6, 3)
    assert set(found.flatten().tolist()) == {expected}
    gumbel = -torch.log(-torch.log(found))
    assert gumbel.isfinite().all()


def test_all_inside_the_interval() -> None:
    found = uniforms(philox_key(1), 0, 70, CHUNK)
    assert float(found.min()) > 0
    assert float(found.max()) < 1


def test_moments_and_distribution() -> None:
    u = uniforms(philox_key(2), 0, 6, CHUNK).flatten().double()
    n = u.numel()
    assert abs(float(u.mean()) - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    ordered = u.sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, 0.1 %


def test_candidates_groups_and_chunks_are_uncorrelated() -> None:
    first, second = (uniforms(philox_key(3), chunk, 6, CHUNK).double() for chunk in (0, 1))
    rows = torch.cat([first, second, first.roll(1, dims=1)])
    correlation = torch.corrcoef(rows) - torch.eye(18)
    assert float(correlation.abs().max()) < 5 / math.sqrt(CHUNK)


def test_fewer_groups_are_the_first_ones() -> None:
    key = philox_key(4)
    assert torch.equal(uniforms(key, 2, 6, 100)[:, :37], uniforms(key, 2, 6, 37))


def test_no_groups() -> None:
    assert uniforms(philox_key(4), 0, 6, 0).shape == (6, 0)


def test_same_inputs_same_values() -> None:
    assert torch.equal(uniforms(philox_key(5, "a"), 1, 6, 50), uniforms(philox_key(5, "a"), 1, 6, 50))


@pytest.mark.parametrize(
    "other", [(6, "a", 1), (5, "b", 1), (5, "a", 2), (5, "a", "1"), (5, "a"), (5, "a1"), (5, 1, "a"), (5, 'a",1')]
)
def test_other_purpose_other_values(other: tuple[int | str, ...]) -> None:
    key, other_key = philox_key(5, "a", 1), philox_key(*other)
    assert not np.array_equal(key, other_key)
    assert not torch.equal(uniforms(key, 0, 6, 20), uniforms(other_key, 0, 6, 20))


part = st.one_of(st.integers(), st.text())


@given(st.tuples(st.integers(), st.lists(part)), st.tuples(st.integers(), st.lists(part)))
def test_keys_are_injective(first: tuple[int, list[int | str]], second: tuple[int, list[int | str]]) -> None:
    same = np.array_equal(philox_key(first[0], *first[1]), philox_key(second[0], *second[1]))
    assert same == (first == second)


def test_key_is_half_a_sha256() -> None:
    key = philox_key(7, "gumbel", "blocks.0.attn.qkv", 3, 0, 1)
    digest = hashlib.sha256(b'[7,"gumbel","blocks.0.attn.qkv",3,0,1]').digest()
    assert key.dtype == np.uint64
    assert [int(k) for k in key] == [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]


def test_generator_is_a_function_of_its_purpose() -> None:
    first = generator(1, "order", 2).permutation(50)
    assert np.array_equal(first, generator(1, "order", 2).permutation(50))
    assert not np.array_equal(first, generator(1, "order", 3).permutation(50))


def test_torch_seed() -> None:
    seeds = [torch_seed(seed, "init") for seed in range(200)]
    assert seeds == [torch_seed(seed, "init") for seed in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
