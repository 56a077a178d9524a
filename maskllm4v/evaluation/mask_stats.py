"""What masks look like, without their tensors: how often each candidate is taken, how seeds agree, and a tile to see.

Everything is counted on the masks themselves, exactly; reports draw it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks
from maskllm4v.sparsity.patterns import MAX_CANDIDATES, NMPattern

TILE = (16, 32)  # rows and columns of a weight that a tile shows at most


@dataclass(frozen=True)
class MasksSeen:
    """Of one row: lines of :func:`mask_statistics` below their ``header``, and a :func:`tile` of the first seed."""

    header: list[str]
    lines: list[list[str]]
    tile: dict[str, Any]


def describe_masks(weight: np.ndarray, masks: Mapping[int, Path], layers: Sequence[str]) -> MasksSeen:
    """Read what :mod:`maskllm4v.checkpoints.masks` wrote and describe it.

    Args:
        weight: the first seed's dense weight ``[out, in]`` of the first layer, as its mask lies on it.
        masks: files of one row by seed.
        layers: all layers with masks, in the model's order; the tile is of the first one.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found = {seed: load_masks(path) for seed, path in masks.items()}
    (seed, first), layer = next(iter(found.items())), layers[0]
    assert first.pattern is not None  # there are masks
    prior = first.prior.get(layer)
    masks_of = (first.masks[layer].flatten(0, -2), None if prior is None else prior.flatten(0, -2))
    corner = tile(torch.from_numpy(weight), *masks_of, first.pattern)
    about = {"layer": layer, "seed": seed, "pattern": str(first.pattern)}
    return MasksSeen(columns(first.pattern), mask_statistics(found, layers), {**about, **corner})


def columns(pattern: NMPattern) -> list[str]:
    """Names of the columns of :func:`mask_statistics`; a candidate is called by its mask, ``1100``.

    Where there are too many, a column a position, called by its bit: ``0100``.
    """
    counted = torch.eye(pattern.m, dtype=torch.bool) if _wide(pattern) else pattern.candidates()
    return ["seed", "layer", "groups", "seed_agreement", *map(bits, counted)]


def mask_statistics(checkpoints: Mapping[int, MaskCheckpoint], layers: Sequence[str]) -> list[list[str]]:
    """Rows of :func:`columns`: seeds from first to last, the layers of each in the order given.

    ``seed_agreement`` is the mean over the other seeds, of those whose channels were permuted alike, of the share of
    groups that have the same mask there (empty where there is no other); the candidates' columns are shares of the
    layer's groups, a position's the share of groups that keep it. Six significant digits.

    Args:
        checkpoints: the masks of one row by seed, all of one pattern.
        layers: names of the layers to count.
    """
    lines: dict[tuple[int, str], list[str]] = {}
    for layer in layers:  # one at a time, for indices take an eighth of a large model's weights
        taken = {seed: _index(found, layer) for seed, found in checkpoints.items()}
        for seed, found in checkpoints.items():
            pattern, index = found.pattern, taken[seed]
            assert pattern is not None  # there are masks
            if _wide(pattern):
                counts = found.masks[layer].reshape(-1, pattern.m).sum(0).tolist()
            else:
                counts = torch.bincount(index.long(), minlength=pattern.num_candidates).tolist()
            others = [
                float((index == taken[other]).double().mean())
                for other, another in checkpoints.items()
                if other != seed and _same_order(found, another)
            ]
            agreement = f"{sum(others) / len(others):.6g}" if others else ""
            shares = [f"{count / len(index):.6g}" for count in counts]
            lines[seed, layer] = [str(seed), layer, str(len(index)), agreement, *shares]
    return [lines[seed, layer] for seed in checkpoints for layer in layers]


def tile(weight: Tensor, mask: Tensor, prior: Tensor | None, pattern: NMPattern) -> dict[str, Any]:
    """The upper left corner of a weight ``[out, in]`` and its masks, for a picture.

    Returns:
        JSON: ``weights``, rows of numbers with four significant digits; ``before``, rows of bits of the mask that
        learning started from (None without one), and ``after``, of the mask; at most :data:`TILE`, whole groups.
    """
    rows, width = TILE[0], TILE[1] - TILE[1] % pattern.m
    corner = weight[:rows, :width].double().tolist()
    return {
        "weights": [[float(f"{value:.4g}") for value in row] for row in corner],
        "before": None if prior is None else [bits(row) for row in prior[:rows, :width]],
        "after": [bits(row) for row in mask[:rows, :width]],
    }


def bits(mask: Tensor) -> str:
    """``"1100"`` of a boolean mask ``[weights]``."""
    return "".join("1" if kept else "0" for kept in mask.tolist())


def _wide(pattern: NMPattern) -> bool:
    return pattern.num_candidates > MAX_CANDIDATES


def _same_order(one: MaskCheckpoint, other: MaskCheckpoint) -> bool:
    """Whether groups of both hold the same channels."""
    a, b = one.permutations, other.permutations
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def _index(checkpoint: MaskCheckpoint, layer: str) -> Tensor:
    assert checkpoint.pattern is not None  # there are masks
    return checkpoint.pattern.to_index(checkpoint.masks[layer], layer)
