"""One-shot methods on whole models and single layers, against their papers' formulas in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_layers import (
    agreement,
    every_layer,
    images,
    inputs_of,
    keep_best,
    layer_case,
    names_in,
    numbers,
    sparsegpt_mask,
)
from timm.models import VisionTransformer
from torch import Tensor, nn

from maskllm4v import prune
from maskllm4v.oneshot.activations.statistics import InputNorm
from maskllm4v.oneshot.methods.ria import prune_ria
from maskllm4v.oneshot.methods.wanda import prune_wanda
from maskllm4v.sparsity.patterns import NMPattern


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


# Whole models


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


def by_relative_importance(weight: Tensor, rows: Tensor, n: int, m: int, exponent: float = 0.5) -> Tensor:
    """RIA, written out weight by weight."""
    size, norms = weight.double().abs(), rows.norm(dim=0)
    column, row = size.sum(0).tolist(), size.sum(1).tolist()
    score = torch.tensor(
        [
            [
                (value / column[j] if column[j] else 0) + (value / row[i] if row[i] else 0)
                for j, value in enumerate(line)
            ]
            for i, line in enumerate(size.tolist())
        ]
    )
    return keep_best(score * norms**exponent, n, m)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize(
    ("method", "how", "reference"),
    [
        ("magnitude", {}, magnitude_reference),
        ("wanda", {}, wanda_reference),
        ("wanda", {"propagate": "pruned"}, block_by_block(by_norm)),
        ("ria", {}, block_by_block(by_relative_importance)),
        ("sparsegpt", {}, block_by_block(by_hessian)),
    ],
    ids=["magnitude", "wanda", "wanda-pruned", "ria", "sparsegpt"],
)
def test_masks_of_a_vit(vit: nn.Module, method: str, how: dict, reference: Callable, pattern: str) -> None:
    batches, (n, m) = images(), numbers(pattern)
    expected = reference(vit, batches, n, m)
    masks = prune(vit, method, pattern=pattern, calibration=batches, exclude=["head"], **how)
    assert agreement(masks, expected, m) >= (1 if method == "magnitude" else 0.999)


@pytest.mark.parametrize(
    ("method", "how", "other"),
    [
        ("wanda", {}, magnitude_reference),
        ("wanda", {"propagate": "pruned"}, wanda_reference),
        ("ria", {}, block_by_block(by_norm)),
        ("ria", {"propagate": "dense"}, block_by_block(by_relative_importance)),
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


# Layer by layer


@every_layer
def test_wanda_scores(out: int, width: int, pattern: str) -> None:
    weight, inputs = layer_case(out, width, dead=5)
    n, m = numbers(pattern)
    statistic = InputNorm(width, torch.device("cpu"))
    for part in inputs.split(300):
        statistic.update(part)
    found = prune_wanda(weight, statistic, NMPattern(pattern), update_weights=False, layer="fc1", seed=0)
    live = inputs.any(0).reshape(-1, m).sum(1) >= n  # among dead inputs, ties
    expected = keep_best(weight.double().abs() * inputs.double().norm(dim=0), n, m)
    same = (found.mask == expected).reshape(out, -1, m).all(2)
    assert same[:, live].all()


@every_layer
@pytest.mark.parametrize("exponent", [0.5, 1.0, 0.0])
def test_ria_scores(out: int, width: int, pattern: str, exponent: float) -> None:
    """Also with rows and columns that are all zero."""
    weight, inputs = layer_case(out, width)
    weight[[0, 3]] = 0
    weight[:, ::7] = 0
    (n, m), statistic = numbers(pattern), InputNorm(width, torch.device("cpu"))
    statistic.update(inputs)
    found = prune_ria(
        weight, statistic, NMPattern(pattern), update_weights=False, layer="x", seed=0, exponent=exponent
    ).mask
    expected = by_relative_importance(weight, inputs.double(), n, m, exponent)
    alive = weight.ne(0).reshape(out, -1, m).sum(2) >= n  # among zeros, ties
    same = (found == expected).reshape(out, -1, m).all(2)
    assert float(same[alive].double().mean()) >= 0.999
    assert alive.double().mean() > 0.5
    assert NMPattern(pattern).is_valid(found)


def test_ria_takes_its_own_exponent_by_default() -> None:
    weight, inputs = layer_case(16, 64)
    statistic, pattern = InputNorm(64, torch.device("cpu")), NMPattern("2:4")
    statistic.update(inputs)
    how = {"update_weights": False, "layer": "x", "seed": 0}
    default = prune_ria(weight, statistic, pattern, **how).mask
    assert torch.equal(default, prune_ria(weight, statistic, pattern, **how, exponent=0.5).mask)
    assert not torch.equal(default, prune_ria(weight, statistic, pattern, **how, exponent=0.0).mask)


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
