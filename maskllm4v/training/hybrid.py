"""Masks learned on updated weights: where a mask was before they are updated, elsewhere the dense ones.

A mask that learning moves from its start then finds the original weights there, and keeps updated ones where it stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.sparsity.layout import from_rows, to_rows
from maskllm4v.sparsity.parameters import find_matrix
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
    matrices = {name: find_matrix(model, name) for name in prior.masks}
    names = {matrix.key for matrix in matrices.values()}
    if different := sorted(names ^ prior.weights.keys()):
        raise CheckpointError(f"updated weights have to be those of the masked layers; {different[0]!r} is not in both")
    for name, mask in prior.masks.items():
        rows, updated = matrices[name].rows, prior.weights[matrices[name].key]
        if rows.shape != mask.shape or updated.shape != matrices[name].weight.shape:
            raise CheckpointError(f"layer {name!r}: the updated weights do not fit the model")
    dense = copy.deepcopy(model) if distillation else None
    if dense is not None:
        dense.eval()
    for name, mask in prior.masks.items():
        rows, layout = matrices[name].rows, matrices[name].layout
        updated = to_rows(prior.weights[matrices[name].key].to(rows), layout)
        matrices[name].write_(torch.where(mask.to(rows.device), updated, rows))
    return dense


def kept_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of masked layers by name in the state dict, zero where masks ``[out, in]`` are."""
    found = [find_matrix(model, name) for name in masks]
    return {
        matrix.key: matrix.weight.detach().masked_fill(from_rows(~masks[matrix.name], matrix.layout, matrix.shape), 0)
        for matrix in found
    }
