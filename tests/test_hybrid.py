"""Masks learned on updated weights: which weights where, what is kept of them, what does not fit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_layers import images
from torch import Tensor, nn

from maskllm4v import apply_masks_, prune, update_weights_
from maskllm4v.checkpoints.apply import install
from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.training.hybrid import kept_weights, start_from_updated_
from maskllm4v.utils.errors import CheckpointError, ConfigError


@pytest.fixture
def prior(tiny_vit: nn.Module) -> MaskCheckpoint:
    """Magnitude masks of the body, and weights updated for them."""
    model = copy.deepcopy(tiny_vit)
    masks = prune(model, "magnitude", exclude=["head"])
    update_weights_(model, calibration=images())
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in masks}
    return MaskCheckpoint(NMPattern("2:4"), masks, "", "least_squares", weights, prior={})


def test_updated_where_kept_and_dense_elsewhere(tiny_vit: nn.Module, prior: MaskCheckpoint) -> None:
    model = copy.deepcopy(tiny_vit).train()
    dense = start_from_updated_(model, prior)
    for name, tensor in tiny_vit.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor)
        expected = tensor
        if name in prior.weights:
            mask = prior.masks[name.removesuffix(".weight")]
            expected = torch.where(mask, prior.weights[name], tensor)
            assert not torch.equal(expected, tensor)
        assert torch.equal(model.state_dict()[name], expected)
    assert not any(module.training for module in dense.modules())
    assert all(module.training for module in model.modules())
    assert not {id(p) for p in dense.parameters()} & {id(p) for p in model.parameters()}


def test_under_the_priors_masks_it_is_the_updated_row(tiny_vit: nn.Module, prior: MaskCheckpoint) -> None:
    (x, *_), updated = images(), install(copy.deepcopy(tiny_vit), prior, "prior")
    model = copy.deepcopy(tiny_vit)
    start_from_updated_(model, prior)
    assert torch.equal(apply_masks_(model, prior.masks, "2:4")(x), updated(x))


def test_checkpoint_of_other_masks_brings_the_model_back(tiny_vit: nn.Module, prior: MaskCheckpoint) -> None:
    """Masks that moved keep dense weights where they went; a dense model and the checkpoint give the same outputs."""
    (x, *_), model = images(), copy.deepcopy(tiny_vit)
    start_from_updated_(model, prior)
    masks = prune(copy.deepcopy(tiny_vit), "random", exclude=["head"])
    weights = kept_weights(model, masks)
    for name, mask in masks.items():
        kept, was = weights[f"{name}.weight"], prior.masks[name]
        assert not kept[~mask].any()
        assert not torch.signbit(kept[~mask]).any()
        assert torch.equal(kept[mask & was], prior.weights[f"{name}.weight"][mask & was])
        assert torch.equal(kept[mask & ~was], tiny_vit.get_submodule(name).weight[mask & ~was])
    learned = MaskCheckpoint(prior.pattern, masks, "", "maskllm", weights, prior.masks)
    expected = apply_masks_(model, masks, "2:4")(x)
    assert torch.equal(install(copy.deepcopy(tiny_vit), learned, "learned")(x), expected)


def spoiled(prior: MaskCheckpoint, kind: str) -> MaskCheckpoint:
    weights: dict[str, Tensor] = dict(prior.weights)
    if kind == "none":
        weights = {}
    elif kind == "one missing":
        del weights["blocks.1.mlp.fc2.weight"]
    elif kind == "another tensor":
        weights["norm.weight"] = torch.ones(32)
    else:
        weights["blocks.1.mlp.fc2.weight"] = torch.ones(4, 4)
    return replace(prior, weights=weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", r"'blocks\.0\.attn\.proj\.weight' is not in both"),
        ("one missing", r"'blocks\.1\.mlp\.fc2\.weight' is not in both"),
        ("another tensor", r"'norm\.weight' is not in both"),
        ("another shape", r"layer 'blocks\.1\.mlp\.fc2': the updated weights do not fit"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    kind: str, message: str, tiny_vit: nn.Module, prior: MaskCheckpoint
) -> None:
    before = copy.deepcopy(tiny_vit.state_dict())
    with pytest.raises(CheckpointError, match=message):
        start_from_updated_(tiny_vit, spoiled(prior, kind))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_vit.state_dict().items())


def test_model_without_the_layer(prior: MaskCheckpoint) -> None:
    other: Any = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="no linear layer"):
        start_from_updated_(other, prior)
