"""``prune()`` on models of all kinds, and the registry of methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_layers import agreement, images, names_in
from torch import Tensor, nn

from maskllm4v import MaskedLinear, current_masks, dense_weight, fold_, prune, register_pruner
from maskllm4v.oneshot import prune as pruners
from maskllm4v.oneshot.activations.statistics import InputNorm
from maskllm4v.oneshot.prune import Pruned
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import ConfigError, DataError, PatternError

METHODS = ["magnitude", "random", "wanda", "ria", "sparsegpt"]
PATTERNS = ["2:4", "1:4", "2:8", "4:8"]


def check_pruned(
    model: nn.Module, masks: dict[str, Tensor], dense: nn.Module, pattern: str, x: Tensor, updated: bool = False
) -> None:
    assert list(masks) == [n for n, layer in model.named_modules() if isinstance(layer, MaskedLinear)]
    zeroed = copy.deepcopy(dense)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert mask.dtype is torch.bool
        weight = dense_weight(layer)
        assert mask.shape == weight.shape
        assert NMPattern(pattern).is_valid(mask)
        assert torch.equal(current_masks(model)[name], mask)
        assert layer.pattern == NMPattern(pattern)
        original = zeroed.get_submodule(name)
        if updated:
            assert not weight[~mask].any()
            original.weight.data.copy_(weight)
        else:
            assert torch.equal(weight, original.weight)
            original.weight.data.mul_(mask)
        if layer.bias is not None:
            assert torch.equal(layer.bias, original.bias)
    with torch.no_grad():
        output = model.eval()(x)
        assert output.isfinite().all()
        assert torch.equal(output, zeroed.eval()(x))
        assert not torch.allclose(output, dense.eval()(x))
        assert torch.equal(fold_(model)(x), output)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_vit(tiny_vit: nn.Module, method: str, pattern: str) -> None:
    dense, batches = copy.deepcopy(tiny_vit), images()
    masks = prune(tiny_vit, method, pattern=pattern, calibration=batches, exclude=[tiny_vit.head])
    assert list(masks) == names_in(dense)
    check_pruned(tiny_vit, masks, dense, pattern, batches[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_vit_with_update(tiny_vit: nn.Module, pattern: str) -> None:
    dense, batches = copy.deepcopy(tiny_vit), images()
    masks = prune(tiny_vit, "sparsegpt", pattern=pattern, calibration=batches, update_weights=True)
    check_pruned(tiny_vit, masks, dense, pattern, batches[0], updated=True)


@pytest.mark.parametrize(("method", "pattern"), [(m, "2:4") for m in METHODS] + [("wanda", p) for p in PATTERNS[1:]])
@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_hierarchical_models(kind: str, method: str, pattern: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"tiny_{kind}")
    dense, batches = copy.deepcopy(model), images(3, 64, count=2, batch=2)
    masks = prune(model, method, pattern=pattern, calibration=batches)
    assert list(masks) == names_in(dense, "")
    check_pruned(model, masks, dense, pattern, batches[0])


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_hierarchical_models_with_update(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"tiny_{kind}")
    dense, batches = copy.deepcopy(model), images(3, 64, count=1, batch=2)
    masks = prune(model, "sparsegpt", calibration=batches, update_weights=True)
    check_pruned(model, masks, dense, "2:4", batches[0], updated=True)


def test_wide_layer_with_groups_that_do_not_divide_128() -> None:
    model = nn.Sequential(nn.Linear(390, 8))
    dense, x = copy.deepcopy(model), torch.randn(500, 390)
    masks = prune(model, "sparsegpt", pattern="3:6", calibration=x, update_weights=True)
    check_pruned(model, masks, dense, "3:6", x, updated=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", (2, 4), NMPattern("2:4")], ids=["str", "tuple", "pattern"])
def test_pattern_in_any_form(tiny_vit: nn.Module, method: str, pattern: object) -> None:
    masks = prune(tiny_vit, method, pattern=pattern, calibration=torch.randn(4, 1, 8, 8))
    assert all(NMPattern("2:4").is_valid(mask) for mask in masks.values())


@pytest.mark.parametrize(
    "given_as",
    [torch.cat, lambda batches: (x for x in batches), lambda batches: [(x, torch.zeros(len(x))) for x in batches]],
    ids=["tensor", "generator", "pairs"],
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_calibration_in_any_form(tiny_vit: nn.Module, method: str, given_as: Callable) -> None:
    batches = images()
    expected = prune(copy.deepcopy(tiny_vit), method, calibration=batches)
    masks = prune(tiny_vit, method, calibration=given_as(batches))
    assert agreement(masks, expected, 4) >= 0.999


def test_own_forward(tiny_vit: nn.Module) -> None:
    batches = images()
    expected = prune(copy.deepcopy(tiny_vit), "wanda", calibration=[x * x for x in batches])
    masks = prune(
        tiny_vit, "wanda", calibration=[{"root": x} for x in batches], forward=lambda model, b: model(b["root"] ** 2)
    )
    assert agreement(masks, expected, 4) >= 0.999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_training_flags_are_kept(tiny_vit: nn.Module, method: str, training: bool) -> None:
    tiny_vit.train(training)
    prune(tiny_vit, method, calibration=images())
    assert {module.training for module in tiny_vit.modules()} == {training}


@pytest.mark.parametrize("method", METHODS)
def test_pruning_again_starts_from_the_dense_weights(tiny_vit: nn.Module, method: str) -> None:
    batches = images()
    expected = prune(copy.deepcopy(tiny_vit), method, pattern="1:4", calibration=batches, propagate="dense")
    prune(tiny_vit, "magnitude", pattern="2:4", exclude=["blocks"])  # its head only
    masks = prune(tiny_vit, method, pattern="1:4", calibration=batches, propagate="dense")
    assert agreement(masks, expected, 4) == 1
    assert all(torch.equal(current_masks(tiny_vit)[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("method", METHODS)
def test_misfits(method: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    x = torch.randn(20, 8)
    with pytest.raises(PatternError, match="layer '1': its 6 input features"):
        prune(model, method, calibration=x)
    assert list(prune(model, method, calibration=x, on_misfit="skip")) == ["0"]
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        ("obs", {}, "method is 'obs'; allowed: magnitude, random, ria, sparsegpt, wanda"),
        ("wanda", {"calibration": None}, "'wanda' needs calibration"),
        ("sparsegpt", {"calibration": None}, "'sparsegpt' needs calibration"),
        ("magnitude", {"update_weights": True}, "update_weights is true, but 'magnitude' cannot"),
        ("wanda", {"update_weights": True}, "update_weights is true, but 'wanda' cannot"),
        ("wanda", {"propagate": "sparse"}, "propagate is 'sparse'; allowed: 'dense', 'pruned'"),
        ("wanda", {"exclude": ["heads"]}, "exclude: 'heads' matches no layer"),
        ("wanda", {"exclude": ["blocks", "head"]}, "nothing to prune"),
        ("wanda", {"on_misfit": "ignore"}, "on_misfit is 'ignore'"),
    ],
)
def test_settings_that_make_no_sense(tiny_vit: nn.Module, method: str, how: dict[str, Any], message: str) -> None:
    before = {name: type(module) for name, module in tiny_vit.named_modules()}
    with pytest.raises(ConfigError, match=message):
        prune(tiny_vit, method, **{"calibration": images(), **how})
    assert {name: type(module) for name, module in tiny_vit.named_modules()} == before


def test_empty_calibration(tiny_vit: nn.Module) -> None:
    with pytest.raises(DataError, match="no batches"):
        prune(tiny_vit, "wanda", calibration=[])


# The registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods registered by a test are gone after it."""
    monkeypatch.setattr(pruners, "_METHODS", dict(pruners._METHODS))


@pytest.mark.usefixtures("registry")
class TestRegistry:
    def test_method_of_ones_own(self, tiny_vit: nn.Module) -> None:
        @register_pruner("smallest-first")
        def smallest_first(weight: Tensor, statistic: Any, pattern: NMPattern, **_: object) -> Pruned:
            assert statistic is None
            return Pruned(pattern.topn_mask(-weight.abs()))

        assert "smallest-first" in pruners.available()
        largest = prune(copy.deepcopy(tiny_vit), "magnitude")
        smallest = prune(tiny_vit, "smallest-first")
        assert all(torch.equal(smallest[name], ~mask) for name, mask in largest.items())

    def test_arguments_of_a_method(self, tiny_vit: nn.Module) -> None:
        calls = []

        @register_pruner("spy", statistic=InputNorm, updates=True, propagate="pruned")
        def spy(weight: Tensor, statistic: Any, pattern: NMPattern, **how: object) -> Pruned:
            calls.append((statistic.rows, str(pattern), how))
            mask = pattern.topn_mask(weight)
            return Pruned(mask, 2 * weight * mask)

        dense = copy.deepcopy(tiny_vit)
        masks = prune(tiny_vit, "spy", pattern="1:4", calibration=images(), update_weights=True, seed=3)
        rows = [72 * 16] * 8 + [72]
        expected = [
            (n, "1:4", {"update_weights": True, "layer": name, "seed": 3})
            for n, name in zip(rows, names_in(dense, ""), strict=True)
        ]
        assert calls == expected
        for name, mask in masks.items():
            assert torch.equal(
                dense_weight(tiny_vit.get_submodule(name)), 2 * dense.get_submodule(name).weight.data * mask
            )

    @pytest.mark.parametrize("propagate", ["dense", "pruned"])
    def test_default_propagation_is_the_methods(self, tiny_vit: nn.Module, propagate: str) -> None:
        @register_pruner("norms", statistic=InputNorm, propagate=propagate)
        def norms(weight: Tensor, statistic: Any, pattern: NMPattern, **_: object) -> Pruned:
            return Pruned(pattern.topn_mask(weight.abs() * statistic.sum_of_squares.sqrt()))

        batches = images()
        expected = prune(copy.deepcopy(tiny_vit), "wanda", calibration=batches, propagate=propagate)
        masks = prune(tiny_vit, "norms", calibration=batches)
        assert agreement(masks, expected, 4) == 1

    @pytest.mark.parametrize("name", ["magnitude", "mine"])
    def test_duplicate_name(self, name: str) -> None:
        first = pruners._METHODS["magnitude"]
        if name == "mine":
            register_pruner("mine")(lambda *_, **__: None)
        with pytest.raises(ConfigError, match=f"'{name}' exists already"):
            register_pruner(name)(lambda *_, **__: None)
        assert pruners._METHODS["magnitude"] is first

    def test_mask_of_a_method_is_checked(self, tiny_vit: nn.Module) -> None:
        @register_pruner("dense")
        def keep_all(weight: Tensor, *_: object, **__: object) -> Pruned:
            return Pruned(torch.ones_like(weight, dtype=torch.bool))

        with pytest.raises(PatternError, match=r"'blocks\.0\.attn\.qkv'.*keeps 4"):
            prune(tiny_vit, "dense")


def test_available() -> None:
    assert pruners.available() == ["magnitude", "random", "ria", "sparsegpt", "wanda"]
