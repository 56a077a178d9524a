"""One-shot methods against their papers' formulas, written out in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from maskllm4v import MaskedLinear, current_masks, fold_, prune, pruners, register_pruner
from maskllm4v.calibration import Hessian, InputNorm
from maskllm4v.errors import ConfigError, DataError, PatternError
from maskllm4v.patterns import NMPattern
from maskllm4v.pruners import Pruned
from maskllm4v.pruners.sparsegpt import prune_sparsegpt
from maskllm4v.pruners.wanda import prune_wanda

METHODS = ["magnitude", "random", "wanda", "sparsegpt"]
PATTERNS = ["2:4", "1:4", "2:8", "4:8"]


# References


def keep_best(scores: Tensor, n: int, m: int) -> Tensor:
    groups = scores.reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(n, 1).indices, True).reshape(scores.shape)


def inputs_of(model: nn.Module, names: Iterable[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Every row that each layer is fed, ``[rows, in]``, while the whole model runs in float64."""
    model = copy.deepcopy(model).double().eval()
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in rows:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=rows[name]: seen.append(args[0].reshape(-1, module.in_features))
        )
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    return {name: torch.cat(seen) for name, seen in rows.items()}


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """The original's ``Hinv`` (upper Cholesky factor of the inverse), and which inputs are dead."""
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True), dead


def sparsegpt_mask(weight: Tensor, hessian: Tensor, n: int, m: int) -> Tensor:
    """Without update: every group by w²/d²."""
    diagonal = inverse_factor(hessian)[0].diagonal()
    return keep_best(weight.double() ** 2 / diagonal**2, n, m)


def sparsegpt_original(weight: Tensor, hessian: Tensor, n: int, m: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """``fasterprune`` as published: blocks of 128 columns, column by column; returns mask and weights."""
    w = weight.double().clone()
    hinv, dead = inverse_factor(hessian, damping)
    w[:, dead] = 0
    mask = torch.zeros_like(w, dtype=torch.bool)
    # The original lets groups straddle its blocks where M does not divide 128; one block avoids that, and
    # the size of the blocks does not change the result otherwise.
    block_size = 128 if 128 % m == 0 else w.shape[1]
    for i1 in range(0, w.shape[1], block_size):
        i2 = min(i1 + block_size, w.shape[1])
        w1, q1, err1 = w[:, i1:i2].clone(), torch.zeros(len(w), i2 - i1).double(), torch.zeros(len(w), i2 - i1).double()
        hinv1 = hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            if i % m == 0:
                scores = w1[:, i : i + m] ** 2 / hinv1.diagonal()[i : i + m] ** 2
                mask[:, i1 + i : i1 + i + m] = keep_best(scores, n, m)
            q = torch.where(mask[:, i1 + i], w1[:, i], 0.0)
            err = (w1[:, i] - q) / hinv1[i, i]
            w1[:, i:] -= err[:, None] @ hinv1[i, i:][None]
            q1[:, i], err1[:, i] = q, err
        w[:, i1:i2] = q1
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    return mask, w


def agreement(a: dict[str, Tensor], b: dict[str, Tensor], m: int) -> float:
    assert a.keys() == b.keys()
    same = [(a[name] == b[name]).reshape(-1, m).all(1) for name in a]
    return float(torch.cat(same).double().mean())


# Layers to prune


def layer_case(out: int, width: int, rows: int = 1024, dead: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs of uneven sizes, of which the first ``dead`` are always zero."""
    inputs = torch.randn(rows, width) @ (torch.eye(width) + 0.7 * torch.randn(width, width) / width**0.5)
    inputs *= torch.rand(width) + 0.2
    inputs[:, torch.randperm(width)[:dead]] = 0
    return torch.randn(out, width), inputs


def hessian_of(inputs: Tensor, dtype: torch.dtype = torch.float32) -> Hessian:
    statistic = Hessian(inputs.shape[1], inputs.device)
    statistic.update(inputs)
    statistic.sum_of_products = statistic.sum_of_products.to(dtype)
    return statistic


def run_sparsegpt(weight: Tensor, statistic: Hessian, pattern: str, update: bool) -> Pruned:
    return prune_sparsegpt(weight, statistic, NMPattern(pattern), update_weights=update, layer="fc1", seed=0)


LAYERS = [(64, 256, "2:4"), (96, 64, "1:4"), (48, 320, "4:8"), (48, 200, "2:8"), (48, 300, "3:6"), (32, 12, "3:6")]
every_layer = pytest.mark.parametrize(("out", "width", "pattern"), LAYERS)


@pytest.fixture
def vit() -> nn.Module:
    """Width 64, depth 3: enough groups for a share of 99.9 % to mean something."""
    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=64,
        depth=3,
        num_heads=4,
        class_token=False,
        global_pool="avg",
        num_classes=10,
    )
    for parameter in model.blocks.parameters():  # as far from its initialisation as training would bring it
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def images(channels: int = 1, size: int = 8, count: int = 3, batch: int = 24) -> list[Tensor]:
    return [torch.randn(batch, channels, size, size) for _ in range(count)]


def names_in(model: nn.Module, part: str = "blocks") -> list[str]:
    return [n for n, layer in model.named_modules() if type(layer) is nn.Linear and n.startswith(part)]


# Whole models against the formulas


def magnitude_reference(model: nn.Module, batches: list[Tensor], n: int, m: int) -> dict[str, Tensor]:
    return {name: keep_best(model.get_submodule(name).weight.detach().abs(), n, m) for name in names_in(model)}


def wanda_reference(model: nn.Module, batches: list[Tensor], n: int, m: int) -> dict[str, Tensor]:
    return {
        name: keep_best(model.get_submodule(name).weight.detach().double().abs() * rows.norm(dim=0), n, m)
        for name, rows in inputs_of(model, names_in(model), batches).items()
    }


def block_by_block(choose: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Prune the layers of one block at a time, on inputs from the model as pruned so far."""

    def reference(model: nn.Module, batches: list[Tensor], n: int, m: int) -> dict[str, Tensor]:
        model, masks = copy.deepcopy(model), {}
        for i in range(len(model.blocks)):
            for name, rows in inputs_of(model, names_in(model, f"blocks.{i}."), batches).items():
                weight = model.get_submodule(name).weight.data
                masks[name] = choose(weight, rows, n, m)
                weight.mul_(masks[name])
        return masks

    return reference


def by_hessian(weight: Tensor, rows: Tensor, n: int, m: int) -> Tensor:
    return sparsegpt_mask(weight, 2 / len(rows) * rows.t() @ rows, n, m)


def by_norm(weight: Tensor, rows: Tensor, n: int, m: int) -> Tensor:
    return keep_best(weight.double().abs() * rows.norm(dim=0), n, m)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize(
    ("method", "how", "reference"),
    [
        ("magnitude", {}, magnitude_reference),
        ("wanda", {}, wanda_reference),
        ("wanda", {"propagate": "pruned"}, block_by_block(by_norm)),
        ("sparsegpt", {}, block_by_block(by_hessian)),
    ],
    ids=["magnitude", "wanda", "wanda-pruned", "sparsegpt"],
)
def test_masks_of_a_vit(vit: nn.Module, method: str, how: dict, reference: Callable, pattern: str) -> None:
    batches, (n, m) = images(), (int(part) for part in pattern.split(":"))
    expected = reference(vit, batches, n, m)
    masks = prune(vit, method, pattern=pattern, calibration=batches, exclude=["head"], **how)
    assert agreement(masks, expected, m) >= (1 if method == "magnitude" else 0.999)


@pytest.mark.parametrize(
    ("method", "how", "other"),
    [
        ("wanda", {}, magnitude_reference),
        ("wanda", {"propagate": "pruned"}, wanda_reference),
        ("sparsegpt", {}, wanda_reference),
        ("sparsegpt", {"propagate": "dense"}, block_by_block(by_hessian)),
    ],
)
def test_agreement_tells_methods_apart(vit: nn.Module, method: str, how: dict, other: Callable) -> None:
    batches = images()
    expected = other(vit, batches, 2, 4)
    assert agreement(prune(vit, method, calibration=batches, exclude=["head"], **how), expected, 4) < 0.995


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_masks_of_an_mlp(propagate: str) -> None:
    """The layers' numbered parent is the chain itself, with activations between them."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    batches, expected = [torch.randn(200, 32)], {}
    reference = copy.deepcopy(model)
    for name in names_in(model, ""):
        seen_by = model if propagate == "dense" else reference
        weight = reference.get_submodule(name).weight.data
        expected[name] = by_norm(weight, inputs_of(seen_by, [name], batches)[name], 2, 4)
        weight.mul_(expected[name])
    masks = prune(model, "wanda", calibration=batches, propagate=propagate)
    assert agreement(masks, expected, 4) >= 0.999


# SparseGPT, layer by layer


@every_layer
@pytest.mark.parametrize("dead", [0, 5])
def test_sparsegpt_mask_without_update(out: int, width: int, pattern: str, dead: int) -> None:
    weight, inputs = layer_case(out, width, dead=dead)
    n, m = (int(part) for part in pattern.split(":"))
    statistic = hessian_of(inputs)
    result = run_sparsegpt(weight, statistic, pattern, update=False)
    assert result.weight is None
    assert agreement({"": result.mask}, {"": sparsegpt_mask(weight, statistic.mean, n, m)}, m) >= 0.999


@every_layer
@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_sparsegpt_with_update(
    out: int, width: int, pattern: str, dead: int, dtype: torch.dtype, tolerance: float
) -> None:
    weight, inputs = layer_case(out, width, dead=dead)
    n, m = (int(part) for part in pattern.split(":"))
    statistic = hessian_of(inputs, dtype)
    result = run_sparsegpt(weight.to(dtype), statistic, pattern, update=True)
    mask, updated = sparsegpt_original(weight, statistic.mean, n, m)
    assert result.weight.dtype is dtype
    assert agreement({"": result.mask}, {"": mask}, m) >= (1 if dtype is torch.float64 else 0.999)
    rows = (result.mask == mask).all(1)  # one other choice changes the rest of its row
    assert rows.double().mean() > 0.8
    torch.testing.assert_close(result.weight.double()[rows], updated[rows], rtol=0, atol=tolerance)
    assert not result.weight[~result.mask].any()
    assert NMPattern(pattern).is_valid(result.mask)


@pytest.mark.parametrize("update", [True, False])
def test_sparsegpt_leaves_its_inputs_alone(update: bool) -> None:
    weight, inputs = layer_case(16, 32, dead=3)
    statistic = hessian_of(inputs)
    before = weight.clone(), statistic.sum_of_products.clone()
    run_sparsegpt(weight, statistic, "2:4", update)
    assert torch.equal(weight, before[0])
    assert torch.equal(statistic.sum_of_products, before[1])


def test_updates_drop_weights_of_dead_inputs() -> None:
    weight, inputs = layer_case(16, 64, dead=20)
    result = run_sparsegpt(weight, hessian_of(inputs), "2:4", update=True)
    dead = ~inputs.any(0)
    assert not result.weight[:, dead].any()
    kept = result.mask[:, dead].reshape(-1)
    assert float(kept.double().mean()) < 0.2  # only where a group has more than two of them


@pytest.mark.parametrize("update", [True, False])
def test_all_inputs_dead(update: bool) -> None:
    weight = torch.randn(8, 16)
    result = run_sparsegpt(weight, hessian_of(torch.zeros(10, 16)), "2:4", update)
    assert NMPattern("2:4").is_valid(result.mask)
    if result.weight is not None:
        assert not result.weight.any()


@every_layer
def test_update_lowers_the_layer_error(out: int, width: int, pattern: str) -> None:
    weight, inputs = layer_case(out, width)
    result = run_sparsegpt(weight, hessian_of(inputs), pattern, update=True)

    def error(pruned: Tensor) -> float:
        return float((inputs @ (pruned - weight).t()).square().sum() / (inputs @ weight.t()).square().sum())

    assert error(result.weight) < error(weight * result.mask)


def indefinite(lowest: float, width: int = 16) -> Hessian:
    """A Hessian of mean diagonal 1 whose lowest eigenvalue is as given."""
    eigenvalues = torch.full((width,), (width - lowest) / (width - 1), dtype=torch.float64)
    eigenvalues[0] = lowest
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    statistic = Hessian(width, torch.device("cpu"))
    statistic.rows = 2  # so that the mean is the sum
    statistic.sum_of_products = basis @ eigenvalues.diag() @ basis.t()
    return statistic


@pytest.mark.parametrize(("lowest", "damping", "warned"), [(-0.05, 0.1, 1), (-0.5, 1.0, 2), (-5.0, 10.0, 3)])
def test_damping_is_raised_with_a_warning(lowest: float, damping: float, warned: int) -> None:
    weight, statistic = torch.randn(16, 16, dtype=torch.float64), indefinite(lowest)
    with pytest.warns(UserWarning, match=r"'fc1'.*not positive definite at damping") as caught:
        result = run_sparsegpt(weight, statistic, "2:4", update=True)
    assert len(caught) == warned
    mask, updated = sparsegpt_original(weight, statistic.mean, 2, 4, damping)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, updated, rtol=0, atol=1e-9)


def test_hopeless_hessian() -> None:
    with pytest.warns(UserWarning, match="damping"), pytest.raises(DataError, match=r"'fc1'.*not positive definite"):
        run_sparsegpt(torch.randn(4, 16), indefinite(-1e5), "2:4", update=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    inputs = torch.randn(20, 16)
    inputs[3, 4] = value
    with pytest.raises(DataError, match=r"'fc1'.*not finite"):
        run_sparsegpt(torch.randn(4, 16), hessian_of(inputs), "2:4", update=False)


# Wanda and random


@every_layer
def test_wanda_scores(out: int, width: int, pattern: str) -> None:
    weight, inputs = layer_case(out, width, dead=5)
    n, m = (int(part) for part in pattern.split(":"))
    statistic = InputNorm(width, torch.device("cpu"))
    for part in inputs.split(300):
        statistic.update(part)
    found = prune_wanda(weight, statistic, NMPattern(pattern), update_weights=False, layer="fc1", seed=0)
    live = inputs.any(0).reshape(-1, m).sum(1) >= n  # among dead inputs, ties
    expected = keep_best(weight.double().abs() * inputs.double().norm(dim=0), n, m)
    same = (found.mask == expected).reshape(out, -1, m).all(2)
    assert same[:, live].all()


def test_random_masks_are_uniform_and_repeatable() -> None:
    def masks(seed: int) -> dict[str, Tensor]:
        return prune(nn.Sequential(nn.Linear(256, 96), nn.Linear(96, 8)), "random", seed=seed)

    first = masks(1)
    assert all(torch.equal(mask, masks(1)[name]) for name, mask in first.items())
    assert not torch.equal(first["0"], masks(2)["0"])
    counts = NMPattern("2:4").to_index(first["0"]).long().bincount(minlength=6).double()
    expected = counts.sum() / 6
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5  # chi-square, 5 degrees, 0.1 %


def test_random_masks_differ_between_layers() -> None:
    masks = prune(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "random")
    assert not torch.equal(masks["0"], masks["1"])


# prune() on models


def check_pruned(
    model: nn.Module, masks: dict[str, Tensor], dense: nn.Module, pattern: str, x: Tensor, updated: bool = False
) -> None:
    assert list(masks) == [n for n, layer in model.named_modules() if isinstance(layer, MaskedLinear)]
    zeroed = copy.deepcopy(dense)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert mask.dtype is torch.bool
        assert mask.shape == layer.weight.shape
        assert NMPattern(pattern).is_valid(mask)
        assert torch.equal(current_masks(model)[name], mask)
        assert layer.pattern == NMPattern(pattern)
        original = zeroed.get_submodule(name)
        if updated:
            assert not layer.weight[~mask].any()
            original.weight.data.copy_(layer.weight)
        else:
            assert torch.equal(layer.weight, original.weight)
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
        ("obs", {}, "method is 'obs'; allowed: magnitude, random, sparsegpt, wanda"),
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
                tiny_vit.get_submodule(name).weight.data, 2 * dense.get_submodule(name).weight.data * mask
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
    assert pruners.available() == ["magnitude", "random", "sparsegpt", "wanda"]
