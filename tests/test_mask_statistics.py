"""What is counted on masks, against counting group by group; the corner that pictures show."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskllm4v.checkpoints.masks import MaskCheckpoint, save_masks
from maskllm4v.evaluation.mask_stats import TILE, bits, columns, describe_masks, mask_statistics, tile
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError

SHAPES = {"late": (6, 16), "early": (40, 48)}  # the second is larger than a tile


def masks(pattern: NMPattern, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: pattern.topn_mask(torch.rand(shape, generator=draw)) for name, shape in SHAPES.items()}


def found(pattern: NMPattern, seed: int, prior: dict[str, Tensor] | None = None) -> MaskCheckpoint:
    return MaskCheckpoint(pattern, masks(pattern, seed), "base", "maskllm", {}, prior or {})


def groups(mask: Tensor, m: int) -> list[str]:
    return [bits(group) for group in mask.reshape(-1, m)]


@pytest.mark.parametrize("name", ["2:4", "1:4", "1:2", "2:8"])
def test_statistics_are_what_counting_gives(name: str) -> None:
    pattern = NMPattern(name)
    checkpoints = {seed: found(pattern, seed) for seed in (3, 1, 2)}
    header, lines = columns(pattern), mask_statistics(checkpoints, ["early", "late"])
    assert [(line[0], line[1]) for line in lines] == [(s, n) for s in "312" for n in ("early", "late")]
    kept = {tuple(i for i, bit in enumerate(name) if bit == "1") for name in header[4:]}
    assert kept == set(combinations(range(pattern.m), pattern.n))
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        seed, layer = int(cells["seed"]), cells["layer"]
        own = groups(checkpoints[seed].masks[layer], pattern.m)
        assert int(cells["groups"]) == len(own)
        for candidate in header[4:]:
            assert float(cells[candidate]) == pytest.approx(own.count(candidate) / len(own), rel=1e-5)
        others = [groups(checkpoints[other].masks[layer], pattern.m) for other in checkpoints if other != seed]
        same = [sum(a == b for a, b in zip(own, other, strict=True)) / len(own) for other in others]
        assert float(cells["seed_agreement"]) == pytest.approx(sum(same) / 2, rel=1e-5)


def test_positions_are_counted_where_there_are_too_many_candidates() -> None:
    pattern, checkpoints = NMPattern("8:16"), {seed: found(NMPattern("8:16"), seed) for seed in (0, 1)}
    header = columns(pattern)
    assert header[4:6] == ["1000000000000000", "0100000000000000"]
    for line in mask_statistics(checkpoints, ["early", "late"]):
        cells = dict(zip(header, line, strict=True))
        groups = checkpoints[int(cells["seed"])].masks[cells["layer"]].reshape(-1, 16)
        for bit, kept in zip(header[4:], groups.t(), strict=True):
            assert float(cells[bit]) == pytest.approx(float(kept.double().mean()), rel=1e-5)


def test_one_seed_agrees_with_nobody_and_equal_seeds_wholly() -> None:
    pattern = NMPattern("2:4")
    assert [line[3] for line in mask_statistics({0: found(pattern, 0)}, list(SHAPES))] == ["", ""]
    twice = {0: found(pattern, 0), 1: found(pattern, 0)}
    assert {line[3] for line in mask_statistics(twice, list(SHAPES))} == {"1"}


@pytest.mark.parametrize(("shape", "size"), [((6, 16), (6, 16)), ((40, 48), TILE)])
def test_tile_is_the_upper_left_corner(shape: tuple[int, int], size: tuple[int, int]) -> None:
    pattern = NMPattern("2:4")
    weight = torch.randn(shape, dtype=torch.float64)
    mask, prior = pattern.topn_mask(weight.abs()), pattern.topn_mask(-weight.abs())
    corner = tile(weight, mask, prior, pattern)
    assert (len(corner["weights"]), len(corner["weights"][0])) == size
    torch.testing.assert_close(
        torch.tensor(corner["weights"], dtype=torch.float64), weight[: size[0], : size[1]], rtol=1e-3, atol=0
    )
    assert corner["after"] == [bits(row) for row in mask[: size[0], : size[1]]]
    assert corner["before"] == [bits(row) for row in prior[: size[0], : size[1]]]
    assert tile(weight, mask, None, pattern)["before"] is None


def test_tile_ends_with_a_whole_group() -> None:
    pattern = NMPattern("1:5")
    mask = pattern.topn_mask(torch.rand(3, 60))
    corner = tile(torch.rand(3, 60), mask, None, pattern)
    assert {len(row) for row in corner["after"]} == {len(row) for row in corner["weights"]} == {30}


def test_files_are_read_and_described(tmp_path: Path) -> None:
    pattern, weight = NMPattern("2:4"), torch.randn(SHAPES["early"])
    paths = {}
    for seed in (5, 4):
        paths[seed] = tmp_path / f"masks{seed}"
        save_masks(paths[seed], MaskCheckpoint(pattern, masks(pattern, seed), "", "maskllm", {}, masks(pattern, 9)))
    seen = describe_masks(weight.numpy(), paths, ["early", "late"])
    assert (seen.tile["layer"], seen.tile["seed"], seen.tile["pattern"]) == ("early", 5, "2:4")
    expected = tile(weight, masks(pattern, 5)["early"], masks(pattern, 9)["early"], pattern)
    assert {key: seen.tile[key] for key in expected} == expected
    assert json.loads(json.dumps(seen.tile)) == seen.tile
    assert seen.header == columns(pattern)
    assert len(seen.lines) == 4
    with pytest.raises(CheckpointError):
        describe_masks(weight.numpy(), {0: tmp_path / "missing"}, ["early"])
