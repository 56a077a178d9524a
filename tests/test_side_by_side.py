"""Statistics layer by layer, of a network that changes and of its dense twin, against whole runs of both."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from awkward_models import AWKWARD
from streaming import check, images, shrink, whole_model_inputs
from test_calibration_parts import MODULATION, conditions_alone, model_and_layers, two_parts
from torch import Tensor, nn

from maskllm4v.oneshot.activations.paired import layer_statistics
from maskllm4v.oneshot.activations.statistics import CrossCovariance
from maskllm4v.sparsity.calibration import Calibration, default_forward, names_by_part
from maskllm4v.sparsity.survey import prunable_matrices
from maskllm4v.utils.errors import ConfigError, DataError

both = pytest.mark.parametrize("paired", [False, True], ids=["alone", "paired"])


def check_paired(found: CrossCovariance, rows: Tensor, twins: Tensor) -> None:
    check(found.hessian, rows)
    expected = rows.t() @ twins
    scale = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found.sum_of_crosses.double(), expected, rtol=1e-5, atol=scale)


def check_layers(
    model: nn.Module,
    parts: list[Calibration],
    *,
    paired: bool,
    layers: Mapping[str, nn.Linear] | None = None,
    change: Callable[[nn.Module, str], None] = lambda model, name: shrink(model.get_submodule(name)),
) -> list[list[str]]:
    """Walk, changing each layer as it comes by, and compare with whole runs; returns the order."""
    layers = prunable_matrices(model) if layers is None else layers
    dense, order = copy.deepcopy(model), []
    untouched = copy.deepcopy(dense)
    for unit in layer_statistics(model, layers, parts, dense=dense if paired else None):
        for name, found in unit.items():
            (part,) = (part for part, own in zip(parts, names_by_part([name], parts), strict=True) if own)
            rows, twins = (whole_model_inputs(m, [name], part.batches, part.forward)[name] for m in (model, dense))
            if paired:
                check_paired(found, rows, twins)
            else:
                check(found, rows)
        for name in unit:
            change(model, name)
        order.append(list(unit))
    assert sorted(name for unit in order for name in unit) == sorted(layers)
    assert all(
        torch.equal(a, b) for a, b in zip(dense.state_dict().values(), untouched.state_dict().values(), strict=True)
    )
    return order


@both
def test_layers_see_what_those_before_them_have_become(tiny_vit: nn.Module, paired: bool) -> None:
    order = check_layers(tiny_vit, [Calibration(images())], paired=paired)
    of_block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert order == [[f"blocks.{i}.{name}"] for i in range(2) for name in of_block] + [["head"]]


@both
@pytest.mark.parametrize("kind", AWKWARD)
def test_any_model(kind: str, paired: bool) -> None:
    model = AWKWARD[kind]().eval()
    check_layers(model, [Calibration([torch.randn(n, 8) for n in (3, 2)])], paired=paired)


@both
def test_no_chain(tiny_swin: nn.Module, paired: bool) -> None:
    layers = {n: m for n, m in prunable_matrices(tiny_swin).items() if n.startswith(("layers.0", "layers.2", "head"))}
    check_layers(tiny_swin, [Calibration([torch.randn(1, 3, 64, 64)])], paired=paired, layers=layers)


@both
@pytest.mark.parametrize("independent", [True, False])
def test_parts(independent: bool, paired: bool) -> None:
    model, layers = model_and_layers()
    parts = two_parts()
    parts[0] = replace(parts[0], independent=independent)
    order = check_layers(model, parts, paired=paired, layers=layers)
    first = [MODULATION] if independent else [[name] for name in MODULATION]
    assert order == first + [[f"blocks.{i}.fc"] for i in range(3)]


@both
def test_layers_may_be_replaced(tiny_vit: nn.Module, paired: bool) -> None:
    def replaced(model: nn.Module, name: str) -> None:
        old = model.get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)

    check_layers(tiny_vit, [Calibration(images())], paired=paired, change=replaced)


@both
def test_one_batch_of_an_independent_part_is_held(paired: bool) -> None:
    model, layers = model_and_layers()
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def batches() -> Iterator[Tensor]:
        for _ in range(3):
            batch = torch.randn(20, 8)
            alive.add(batch)
            yield batch
            del batch
            assert len(alive) <= 1

    part = Calibration(batches(), conditions_alone, independent=True)
    own = {name: layers[name] for name in MODULATION}
    (unit,) = layer_statistics(model, own, [part], dense=copy.deepcopy(model) if paired else None)
    for found in unit.values():
        assert (found.hessian if paired else found).rows == 60


def test_inputs_that_a_model_changes_in_place_are_seen_as_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.a(x)
            x.add_(y)
            z = self.b(x)
            return x.mul_(3) + z

    check_layers(InPlace().eval(), [Calibration([torch.randn(5, 8) for _ in range(2)])], paired=True)


class Routed(nn.Module):
    """Sends tokens to a layer by what another layer says."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x)[:, 0] > 0
        return self.expert(x[chosen]).sum()


def test_other_tokens_in_the_dense_network() -> None:
    model = Routed().eval()
    layers = prunable_matrices(model)
    stream = layer_statistics(model, layers, [Calibration([torch.randn(64, 8)])], dense=copy.deepcopy(model))
    assert list(next(stream)) == ["gate"]
    shrink(model.gate)
    with pytest.raises(DataError, match="'expert' sees other tokens in the dense network"):
        next(stream)
    assert not any(module._forward_pre_hooks for module in model.modules())
    check_layers(Routed().eval(), [Calibration([torch.randn(64, 8)])], paired=False)


@both
@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
@pytest.mark.parametrize("independent", [True, False])
def test_no_batches(tiny_vit: nn.Module, batches: Iterable[Any], independent: bool, paired: bool) -> None:
    part = Calibration(batches, independent=independent)
    dense = copy.deepcopy(tiny_vit) if paired else None
    with pytest.raises(DataError, match="no batches"):
        next(layer_statistics(tiny_vit, prunable_matrices(tiny_vit), [part], dense=dense))


@both
def test_layer_that_is_never_reached(paired: bool) -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "spare": nn.Linear(8, 8)}).train()
    part = Calibration([torch.randn(2, 8)], lambda model, batch: model["body"](batch))
    stream = layer_statistics(model, prunable_matrices(model), [part], dense=copy.deepcopy(model) if paired else None)
    with pytest.raises(DataError, match=r"'spare'.*never reached"):
        list(stream)
    assert all(module.training for module in model.modules())


def test_part_without_a_layer_of_a_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="no part names layer '0'"):
        next(layer_statistics(model, prunable_matrices(model), [Calibration([], layers=("1",))]))


def test_modes_and_hooks_are_restored_in_both(tiny_vit: nn.Module) -> None:
    dense = copy.deepcopy(tiny_vit).train()
    tiny_vit.blocks[0].train()
    before = [[m.training for m in model.modules()] for model in (tiny_vit, dense)]
    stream = layer_statistics(tiny_vit, prunable_matrices(tiny_vit), [Calibration(images())], dense=dense)
    next(stream)
    assert not any(m.training for model in (tiny_vit, dense) for m in model.modules())
    stream.close()
    assert [[m.training for m in model.modules()] for model in (tiny_vit, dense)] == before
    assert not any(m._forward_pre_hooks for model in (tiny_vit, dense) for m in model.modules())


def test_no_more_of_a_block_is_run_than_a_layer_needs(tiny_vit: nn.Module) -> None:
    done: dict[str, int] = {}
    dense = copy.deepcopy(tiny_vit)
    for model, who in ((tiny_vit, "model"), (dense, "dense")):
        for name, layer in prunable_matrices(model).items():
            count = partial(lambda key, *_: done.__setitem__(key, done.get(key, 0) + 1), f"{who} {name}")
            layer.module.register_forward_hook(count)
    layers = prunable_matrices(tiny_vit, exclude=["head"])
    for _ in layer_statistics(tiny_vit, layers, [Calibration(images()[:1], default_forward)], dense=dense):
        pass
    # Before the first block's second, third and fourth layer, and to go on to the next block; the model once more, to
    # see what feeds what.
    assert (done["dense blocks.0.attn.qkv"], done["dense blocks.0.mlp.fc2"]) == (4, 1)
    assert (done["model blocks.0.attn.qkv"], done["model blocks.0.mlp.fc2"]) == (5, 2)
    assert "dense blocks.1.mlp.fc2" not in done
    assert done["model blocks.1.mlp.fc2"] == 1
