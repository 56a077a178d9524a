"""Masks learned on updated weights: where a mask was before they are updated, elsewhere the dense ones.

A mask that learning moves from its start then finds the original weights there, and keeps updated ones where it stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.sparsity.surgery import get_linear
from maskllm4v.utils.errors import CheckpointError


@torch.no_grad()
def start_from_updated_(model: nn.Module, prior: MaskCheckpoint, *, distillation: float = 1.0) -> nn.Module | None:
    """Put a checkpoint's updated weights into a dense model in place, where its masks keep them.

    Returns:
        A copy of the dense model as it was, in evaluation mode: the teacher, if there is anything to distil.

    Raises:
        CheckpointError: the checkpoint has updated weights of other tensors, not of all its layers, or of another
            model's.
    """
    names = {f"{name}.weight" for name in prior.masks}
    if different := sorted(names ^ prior.weights.keys()):
        raise CheckpointError(f"updated weights have to be those of the masked layers; {different[0]!r} is not in both")
    for name, mask in prior.masks.items():
        if not get_linear(model, name).weight.shape == mask.shape == prior.weights[f"{name}.weight"].shape:
            raise CheckpointError(f"layer {name!r}: the updated weights do not fit the model")
    dense = copy.deepcopy(model) if distillation else None
    if dense is not None:
        dense.eval()
    for name, mask in prior.masks.items():
        weight, updated = get_linear(model, name).weight, prior.weights[f"{name}.weight"]
        weight.copy_(torch.where(mask.to(weight.device), updated.to(weight), weight))
    return dense


def kept_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of masked layers by name in the state dict, zero where masks ``[out, in]`` are."""
    weights = {name: get_linear(model, name).weight.detach() for name in masks}
    return {f"{name}.weight": weight.masked_fill(~masks[name], 0) for name, weight in weights.items()}
