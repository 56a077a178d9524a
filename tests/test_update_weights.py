"""Updating the weights of whole models, against plain loops in float64; what stays as it is; what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_layers import images
from streaming import whole_model_inputs
from test_calibration_dit import DENSE, dit
from test_calibration_dit import two_parts as dit_parts
from test_calibration_parts import model_and_layers, two_parts
from test_updates import direct
from torch import Tensor, nn

import maskllm4v
from maskllm4v import (
    MaskedLinear,
    apply_masks_,
    current_masks,
    dense_weight,
    fold_,
    make_learnable,
    prune,
    update_weights_,
)
from maskllm4v.utils.errors import ConfigError, DataError

Masks = dict[str, Tensor]


@pytest.fixture
def vit(tiny_vit: nn.Module) -> nn.Module:
    """As far from its initialisation as training would bring it: else no layer changes what later ones see."""
    for parameter in tiny_vit.blocks.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tiny_vit


def masked_vit(model: nn.Module, pattern: str = "2:4") -> tuple[nn.Module, Masks]:
    """Its body under magnitude masks, the dense weights below them."""
    masked = copy.deepcopy(model)
    return masked, prune(masked, "magnitude", pattern=pattern, exclude=["head"])


def reference(
    dense: nn.Module, masks: Masks, batches: list[Tensor], *, asymmetric: bool, damping: float = 0.1
) -> dict[str, Tensor]:
    """Layer after layer: inputs from a run of the whole network as it has become, a direct solution of each row."""
    dense = copy.deepcopy(dense).double().eval()
    network, batches, found = copy.deepcopy(dense), [batch.double() for batch in batches], {}
    for name, mask in masks.items():
        inputs, own = (whole_model_inputs(m, [name], batches, lambda m, x: m(x))[name] for m in (network, dense))
        weight = dense.get_submodule(name).weight.data
        found[name] = direct(weight, mask, inputs, own if asymmetric else inputs, damping)
        network.get_submodule(name).weight.data.copy_(found[name])
    return found


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("target", ["asymmetric", "symmetric"])
def test_least_squares_of_a_vit(vit: nn.Module, target: Any, pattern: str) -> None:
    batches = images()
    masked, masks = masked_vit(vit, pattern)
    assert update_weights_(masked, calibration=batches, target=target) is masked
    expected = reference(vit, masks, batches, asymmetric=target == "asymmetric")
    other = reference(vit, masks, batches, asymmetric=target != "asymmetric")
    for name, mask in masks.items():
        layer = masked.get_submodule(name)
        assert isinstance(layer, MaskedLinear)
        assert torch.equal(layer.current_mask(), mask)
        weight = dense_weight(layer).detach()
        assert not weight[~mask].any()
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(weight.double(), expected[name], rtol=0, atol=1e-4 * scale)
        if name != "blocks.0.attn.qkv":  # whose inputs are the same in both networks
            assert not torch.allclose(weight.double(), other[name], rtol=0, atol=1e-2 * scale)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_sparsegpts_update_of_its_own_masks_is_sparsegpt(vit: nn.Module, pattern: str) -> None:
    batches, pruned = images(), copy.deepcopy(vit)
    masks = prune(pruned, "sparsegpt", pattern=pattern, calibration=batches, update_weights=True)
    masked = apply_masks_(copy.deepcopy(vit), masks, pattern)
    update_weights_(masked, "sparsegpt", calibration=batches)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(masked.state_dict()[name], tensor), name


def layer_error(dense: nn.Module, sparse: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return float(sum((dense(x) - sparse(x)).square().sum() for x in batches))


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
def test_outputs_come_closer_to_the_dense_ones(vit: nn.Module, method: str) -> None:
    batches = images()
    masked, _ = masked_vit(vit)
    before = layer_error(vit, masked, batches)
    update_weights_(masked, method, calibration=batches)
    assert layer_error(vit, masked, batches) < 0.7 * before


# Where the dense weights come from


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
@pytest.mark.parametrize("target", [None, "symmetric"])
def test_dense_model_given_for_weights_that_are_gone(vit: nn.Module, method: str, target: Any) -> None:
    batches = images()
    masked, masks = masked_vit(vit)
    expected = update_weights_(copy.deepcopy(masked), method, calibration=batches, target=target).state_dict()
    zeroed = apply_masks_(fold_(masked), masks, "2:4")
    dense = copy.deepcopy(vit)
    update_weights_(zeroed, method, calibration=batches, dense=dense, target=target)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in zeroed.state_dict().items())
    untouched = vit.state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in dense.state_dict().items())
    assert list(dense.state_dict()) == list(untouched)


def test_updating_twice_is_updating_once_where_the_dense_model_is_given(vit: nn.Module) -> None:
    batches = images()
    masked, _ = masked_vit(vit)
    once = copy.deepcopy(update_weights_(masked, calibration=batches, dense=vit).state_dict())
    twice = update_weights_(masked, calibration=batches, dense=vit).state_dict()
    assert all(torch.equal(tensor, once[name]) for name, tensor in twice.items())


def test_model_that_shares_parameters_is_left_alone(vit: nn.Module) -> None:
    before = copy.deepcopy(vit.state_dict())
    masked, masks = masked_vit(vit)
    for name in masks:  # as `apply_masks_` leaves them: one parameter in two models
        masked.get_submodule(name).weight = vit.get_submodule(name).weight
    update_weights_(masked, calibration=images(), dense=vit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert not torch.equal(dense_weight(masked.blocks[0].attn.qkv), vit.blocks[0].attn.qkv.weight)


def test_learned_masks_are_taken_as_they_are(vit: nn.Module) -> None:
    batches, (_, masks) = images(), masked_vit(vit)
    learnable = make_learnable(copy.deepcopy(vit), masks, pattern="2:4")
    chosen = current_masks(learnable)
    expected = update_weights_(apply_masks_(copy.deepcopy(vit), chosen, "2:4"), calibration=batches)
    update_weights_(learnable, calibration=batches)
    assert all(isinstance(learnable.get_submodule(name), MaskedLinear) for name in masks)
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in learnable.state_dict().items())
    assert not any(parameter.requires_grad for parameter in learnable.parameters())


# Whatever the model


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
@pytest.mark.parametrize("model", ["tiny_swin", "tiny_convnext"])
def test_models_without_a_chain(model: str, method: str, request: pytest.FixtureRequest) -> None:
    dense = request.getfixturevalue(model)
    keep = [f"{stage}.*" for stage in ("layers.0", "layers.2", "stages.0", "stages.2") if hasattr(dense, stage[:-2])]
    masked = copy.deepcopy(dense)
    prune(masked, "magnitude", exclude=keep)
    batches = [torch.randn(4, 3, 64, 64)]
    before = layer_error(dense, masked, batches)
    update_weights_(masked, method, calibration=batches)
    assert layer_error(dense, masked, batches) < before


@pytest.mark.parametrize("target", ["asymmetric", "symmetric"])
def test_two_parts_in_their_order(target: Any) -> None:
    """What the second part's layers see depends on the first's, which see conditions alone."""
    model, layers = model_and_layers()
    parts, masked = two_parts(), copy.deepcopy(model)
    masks = prune(masked, "magnitude", exclude=["embed"])
    update_weights_(masked, calibration=parts, target=target)
    network, dense = (copy.deepcopy(model).double() for _ in range(2))
    for part, kind in zip(parts, ("modulation", "fc"), strict=True):
        batches = [tuple(x.double() for x in b) if isinstance(b, tuple) else b.double() for b in part.batches]
        for name in (name for name in layers if name.endswith(kind)):
            seen, own = (whole_model_inputs(m, [name], batches, part.forward)[name] for m in (network, dense))
            weight = dense.get_submodule(name).weight.data
            expected = direct(weight, masks[name], seen, own if target == "asymmetric" else seen, 0.1)
            network.get_submodule(name).weight.data.copy_(expected)
            found = dense_weight(masked.get_submodule(name)).detach().double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("method", "target"), [("least_squares", "asymmetric"), ("least_squares", "symmetric"), ("sparsegpt", None)]
)
def test_dit(method: str, target: Any) -> None:
    dense = dit(2)
    masked, parts = copy.deepcopy(dense), dit_parts()
    masks = prune(masked, "magnitude", exclude=DENSE)
    assert len(masks) == 2 * 7

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            pairs = [(part.forward(model, b), part.forward(dense, b)) for part in parts[1:] for b in part.batches]
        return float(sum((a.sample - b.sample).square().sum() for a, b in pairs))

    before = error(masked)
    update_weights_(masked, method, calibration=parts, target=target)
    assert error(masked) < before
    assert current_masks(masked).keys() == masks.keys()


# What stays, and what is refused


def snapshot(model: nn.Module) -> tuple[dict[str, Any], list[tuple[str, type, bool]], list[int]]:
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    return copy.deepcopy(model.state_dict()), modules, [id(p) for p in model.parameters()]


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
def test_modes_and_gradients_stay(vit: nn.Module, method: str) -> None:
    masked, masks = masked_vit(vit)
    masked.train()
    masked.blocks[1].eval()
    dense_weight(masked.get_submodule("blocks.0.mlp.fc1")).requires_grad_(False)
    before, flags = snapshot(masked)[1], [p.requires_grad for p in masked.parameters()]
    update_weights_(masked, method, calibration=images())
    assert snapshot(masked)[1] == before
    assert [p.requires_grad for p in masked.parameters()] == flags
    assert not any(module._forward_pre_hooks for module in masked.modules() if module is not masked)
    assert len(masked._forward_pre_hooks) == len(masked._forward_hooks) == 1  # those of all masked models
    for name in masks:
        assert masked.get_submodule(name).bias is not None


def nothing(model: nn.Module) -> nn.Module:
    return model


def all_alike(batches: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(batch) for batch in batches]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"method": "obs"}, ConfigError, "method is 'obs'; allowed: least_squares, sparsegpt"),
        ({"target": "both"}, ConfigError, "target is 'both'; allowed for 'least_squares': 'asymmetric', 'symmetric'"),
        ({"method": "sparsegpt", "target": "asymmetric"}, ConfigError, "allowed for 'sparsegpt': 'symmetric'"),
        ({"calibration": []}, DataError, "no batches"),
        ({"calibration": iter(())}, DataError, "no batches"),
        ({"damping": 0.0, "calibration": [torch.randn(1, 1, 8, 8)]}, DataError, r"'blocks\.0\.attn\.qkv', row \d+: "),
        ({"dense": nn.Linear(4, 4)}, ConfigError, r"no linear layer 'blocks\.0\.attn\.qkv'"),
    ],
)
@pytest.mark.parametrize("start", ["pruned", "learnable"])
def test_after_an_error_the_model_is_as_it_was(
    vit: nn.Module, how: dict[str, Any], kind: type[Exception], message: str, start: str
) -> None:
    model, masks = masked_vit(vit)
    if start == "learnable":
        model = make_learnable(copy.deepcopy(vit), masks, pattern="2:4")
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        update_weights_(model, **{"calibration": images(), **how})
    after = snapshot(model)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert after[1:] == before[1:]


def test_failure_half_way_leaves_nothing_half_updated(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = masked_vit(vit)
    before = snapshot(model)
    method = maskllm4v.oneshot.weight_update.METHODS["least_squares"]

    def fails(weight: Tensor, *arguments: Any, layer: str, **how: Any) -> Tensor:
        if layer == "blocks.1.attn.proj":
            raise KeyboardInterrupt
        return method.update_layer(weight, *arguments, layer=layer, **how)

    changed: Callable[..., Any] = type(method)
    monkeypatch.setitem(
        maskllm4v.oneshot.weight_update.METHODS,
        "least_squares",
        changed(fails, method.targets, method.damping, method.layerwise),
    )
    with pytest.raises(KeyboardInterrupt):
        update_weights_(model, calibration=images())
    after = snapshot(model)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert after[1:] == before[1:]


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
def test_weight_that_is_not_finite_is_named(vit: nn.Module, method: str) -> None:
    masked, _ = masked_vit(vit)
    dense_weight(masked.blocks[1].mlp.fc2).data[3, 5] = float("nan")
    with pytest.raises(DataError, match=r"'blocks\.1\.mlp\.fc2': .* not finite"):
        update_weights_(masked, method, calibration=images())


def test_model_without_masks(vit: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no masked layer"):
        update_weights_(vit, calibration=images())


def test_dense_model_of_another_width(vit: nn.Module) -> None:
    masked, _ = masked_vit(vit)
    other = copy.deepcopy(vit)
    other.blocks[0].mlp.fc1 = nn.Linear(32, 64)
    with pytest.raises(ConfigError, match=r"'blocks\.0\.mlp\.fc1': \(128, 32\), but \(64, 32\) in dense"):
        update_weights_(masked, calibration=images(), dense=other)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_damping_that_is_none(vit: nn.Module, damping: float) -> None:
    masked, _ = masked_vit(vit)
    with pytest.raises(ConfigError, match=f"damping is {damping}; allowed: 0 or more"):
        update_weights_(masked, calibration=images(), damping=damping)


def test_dense_model_that_is_masked(vit: nn.Module) -> None:
    masked, _ = masked_vit(vit)
    for dense in (masked, copy.deepcopy(masked)):
        with pytest.raises(ConfigError, match="dense has masks"):
            update_weights_(masked, calibration=images(), dense=dense)


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
def test_weights_can_be_written_down(vit: nn.Module, method: str, tmp_path: Path) -> None:
    masked, _ = masked_vit(vit)
    save_file(update_weights_(masked, method, calibration=images()).state_dict(), tmp_path / "x.safetensors")
