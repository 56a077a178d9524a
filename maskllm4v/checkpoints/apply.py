"""Masks, updated weights and permutations of a checkpoint, put into the dense model that they were made from."""

from __future__ import annotations

import torch
from torch import nn

from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.sparsity.parameters import find_matrix
from maskllm4v.sparsity.permutation import apply_permutations_
from maskllm4v.sparsity.surgery import apply_masks_
from maskllm4v.utils.errors import CheckpointError, ConfigError


def install(model: nn.Module, checkpoint: MaskCheckpoint, origin: str) -> nn.Module:
    """Put a checkpoint's permutations, updated weights and masks into a dense model, in place; returns it.

    Raises:
        CheckpointError: a layer or tensor is missing or has another shape, or its channels cannot be permuted so.
    """
    return overlay(permute(model, checkpoint, origin), checkpoint)


def permute(model: nn.Module, checkpoint: MaskCheckpoint, origin: str) -> nn.Module:
    """Put a checkpoint's permutations alone into a dense model, in place; raises as :func:`install`."""
    check_fits(model, checkpoint, origin)
    try:
        return apply_permutations_(model, checkpoint.permutations)
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def overlay(model: nn.Module, checkpoint: MaskCheckpoint) -> nn.Module:
    """Put a checkpoint's updated weights and masks into a model that is permuted as it asks, in place; returns it."""
    state = model.state_dict()
    with torch.no_grad():
        for name, weight in checkpoint.weights.items():
            state[name].copy_(weight)
    if checkpoint.pattern is not None:
        apply_masks_(model, checkpoint.masks, checkpoint.pattern)
    return model


def check_fits(model: nn.Module, checkpoint: MaskCheckpoint, origin: str) -> None:
    """Raise :class:`CheckpointError` unless every mask and tensor has its place in the model."""
    state = model.state_dict()
    for name, mask in checkpoint.masks.items():
        try:
            fits = find_matrix(model, name).rows.shape == mask.shape
        except ConfigError as error:
            raise CheckpointError(f"{origin}: layer {name!r} does not fit the model: {error}") from error
        if not fits:
            raise CheckpointError(f"{origin}: layer {name!r} does not fit the model")
    for name, weight in checkpoint.weights.items():
        if name not in state or state[name].shape != weight.shape:
            raise CheckpointError(f"{origin}: tensor {name!r} does not fit the model")
