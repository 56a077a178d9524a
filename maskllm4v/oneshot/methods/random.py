"""Random pruning: every candidate equally likely, the floor that any method has to beat."""

from typing import Any

import torch
from torch import Tensor

from maskllm4v.oneshot.methods.result import Pruned
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.rng import generator


def prune_random(
    weight: Tensor, statistic: Any, pattern: NMPattern, *, update_weights: bool, layer: str, seed: int
) -> Pruned:
    """Draw each group's candidate from (seed, layer name)."""
    index = generator(seed, "random-mask", layer).integers(
        pattern.num_candidates, size=pattern.num_groups(weight, layer), dtype="uint8" if pattern.bits <= 8 else "int16"
    )
    return Pruned(pattern.from_index(torch.from_numpy(index).to(weight.device), weight.shape))
