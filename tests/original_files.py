"""Files as the original and timm write them."""

from __future__ import annotations

import argparse
import itertools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.checkpoints.third_party import LoadedWeights, load_any

PAIRS = list(itertools.combinations(range(4), 2))  # the original's candidates of 2:4, in its order
LAYERS = {"blocks.0.fc": (8, 16), "blocks.1.fc": (6, 8)}
FIRST, SECOND = LAYERS


def weights() -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, shape in {**LAYERS, "head": (3, 6)}.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return {**state, "norm.weight": torch.randn(6)}


def winners(count: int = 6) -> dict[str, Tensor]:
    """A candidate's number for each group of 4."""
    return {name: torch.randint(count, (out * wide // 4,)) for name, (out, wide) in LAYERS.items()}


def mask_of(chosen: Tensor, shape: tuple[int, int]) -> Tensor:
    """Element by element, groups row after row."""
    mask = torch.zeros(shape, dtype=torch.bool)
    groups = shape[1] // 4
    for number, candidate in enumerate(chosen.tolist()):
        for place in PAIRS[candidate]:
            mask[number // groups, number % groups * 4 + place] = True
    return mask


def masks_of(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask_of(chosen[name], shape) for name, shape in LAYERS.items()}


def gates_of(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits ``[groups, 6]`` whose largest are the chosen ones."""
    return {name: torch.randn(len(c), 6).clamp(-3, 3) + 7 * F.one_hot(c, 6) for name, c in chosen.items()}


def pruned(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the pruning script saves it."""
    return weights() | {f"{name}.mask": mask for name, mask in masks.items()}


def gated(gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the training saves it, with masks that are not those of the logits."""
    stale = {f"{name}.mask": torch.ones(LAYERS[name]) for name in gates}
    return pruned({}) | stale | {f"{name}.gate": gate for name, gate in gates.items()}


def timm_file(path: Path, state: dict[str, Tensor], **others: Any) -> Path:
    """As timm's ``CheckpointSaver`` writes it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    arguments = argparse.Namespace(model="vit", lr=1e-3, mean=[0.5], tau_range=[4.0, 0.05], opt_betas=None)
    whole = {"epoch": 3, "arch": "vit", "state_dict": OrderedDict(state), "optimizer": optimizer.state_dict()}
    torch.save({**whole, "version": 2, "args": arguments, "metric": 79.4, **others}, path)
    return path


def saved(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def state_at(path: Path, **options: Any) -> LoadedWeights:
    found = load_any(path, **options)
    assert isinstance(found, LoadedWeights)
    return found


def same(found: Any, expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
