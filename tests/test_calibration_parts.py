"""Calibrations of several parts: who sees which batches, in what order, and what they cost."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from streaming import both_ways, check, shrink, whole_model_inputs
from torch import Tensor, nn

from maskllm4v import MaskedLinear, prune
from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.evaluation.layer_errors import layer_diagnostics
from maskllm4v.oneshot.activations.sequential import part_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.sparsity.calibration import Calibration, default_forward, names_by_part
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import prunable_matrices
from maskllm4v.utils.errors import ConfigError, DataError

Batch = tuple[Tensor, Tensor]  # tokens [B, T, 8], conditions [B, 8]


class Modulated(nn.Module):
    """``fc`` sees tokens, shifted and scaled by what ``modulation`` makes of the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.fc = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        return x + torch.tanh(self.fc(x * (1 + scale) + shift))


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Modulated() for _ in range(3)])

    def forward(self, batch: Batch) -> Tensor:
        x, condition = batch[0], torch.tanh(self.embed(batch[1]))
        for block in self.blocks:
            x = block(x, condition)
        return x


def whole(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch)


def conditions_alone(model: TwoParts, condition: Tensor) -> None:
    embedded = torch.tanh(model.embed(condition))
    for block in model.blocks:
        block.modulation(embedded)


MODULATION = [f"blocks.{i}.modulation" for i in range(3)]
BODIES = [f"blocks.{i}.fc" for i in range(3)]


def model_and_layers() -> tuple[nn.Module, dict[str, nn.Linear]]:
    model = TwoParts().eval()
    return model, prunable_matrices(model, exclude=["embed"])


def two_parts() -> list[Calibration]:
    conditions = [torch.randn(n, 8) for n in (20, 30)]
    tokens = [(torch.randn(n, 5, 8), torch.randn(n, 8)) for n in (3, 1, 2)]
    return [
        Calibration(conditions, conditions_alone, ("*.modulation",), independent=True),
        Calibration(tokens, whole),
    ]


def inputs_by_part(model: nn.Module, parts: Sequence[Calibration], names: Sequence[str]) -> dict[str, Tensor]:
    """What each layer sees in the whole model as it is, on the batches of its part."""
    shares = zip(parts, names_by_part(names, parts), strict=True)
    found = [whole_model_inputs(model, own, part.batches, part.forward) for part, own in shares]
    return {name: rows for one in found for name, rows in one.items()}


# Statistics


@both_ways
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
@pytest.mark.parametrize("independent", [True, False])
def test_statistics_are_those_of_the_parts_in_order(independent: bool, statistic: type, propagate: str) -> None:
    model, layers = model_and_layers()
    untouched, parts = copy.deepcopy(model), two_parts()
    parts[0] = replace(parts[0], independent=independent)
    units = []
    for unit in part_statistics(model, layers, parts, statistic, propagate=propagate):
        expected = inputs_by_part(untouched if propagate == "dense" else model, parts, list(unit))
        for name, found in unit.items():
            check(found, expected[name])
        for name in unit:
            shrink(layers[name])
        units.append(list(unit))
    first = [MODULATION] if independent else [[name] for name in MODULATION]
    bodies = [[name] for name in BODIES]
    assert units == (bodies + first if propagate == "dense" else first + bodies)
    # Else the order would not matter: what the second part sees is another thing once the first is changed.
    before, after = (inputs_by_part(one, parts, BODIES)["blocks.0.fc"] for one in (untouched, model))
    assert not torch.allclose(before, after, rtol=0.1)


@both_ways
def test_wrong_order_of_parts_gives_other_statistics(propagate: str) -> None:
    """What depends on another part's layers, standing before it, sees them as they should not be seen."""
    model, layers = model_and_layers()
    parts = [replace(two_parts()[1], layers=("*.fc",)), two_parts()[0]]
    untouched, found = copy.deepcopy(model), {}
    for unit in part_statistics(model, layers, parts, InputNorm, propagate=propagate):
        found.update({name: one.sum_of_squares.double() for name, one in unit.items()})
        for name in unit:
            shrink(layers[name])
    seen_by = untouched if propagate == "dense" else model
    expected = inputs_by_part(seen_by, parts, ["blocks.0.fc"])["blocks.0.fc"].square().sum(0)
    assert not torch.allclose(found["blocks.0.fc"], expected, rtol=0.1)


@both_ways
def test_one_part_is_what_its_batches_are(tiny_vit: nn.Module, propagate: str) -> None:
    batches = [torch.randn(n, 1, 8, 8) for n in (30, 42)]
    other = copy.deepcopy(tiny_vit)
    how = {"propagate": propagate, "update_weights": True}
    expected = prune(tiny_vit, "sparsegpt", calibration=batches, forward=default_forward, **how)
    masks = prune(other, "sparsegpt", calibration=Calibration(batches), **how)
    assert list(masks) == list(expected)
    assert all(
        torch.equal(x, y) for x, y in zip(tiny_vit.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@both_ways
def test_pruning_by_parts_is_pruning_part_after_part(method: str, propagate: str) -> None:
    model, _ = model_and_layers()
    parts, by_hand = two_parts(), copy.deepcopy(model)
    how = {"propagate": propagate, "update_weights": method == "sparsegpt"}
    masks = prune(model, method, calibration=parts, exclude=["embed"], **how)
    order = [(parts[0], "*.fc"), (parts[1], "*.modulation")]
    expected = {}
    for part, rest in order if propagate == "pruned" else reversed(order):
        own = replace(part, layers=("*",), independent=False)
        expected |= prune(by_hand, method, calibration=own, exclude=["embed", rest], **how)
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    assert all(
        torch.equal(x, y) for x, y in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True)
    )
    assert all(isinstance(model.get_submodule(name), MaskedLinear) for name in masks)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([("*",), ("*.fc",)], [[*MODULATION, *BODIES], []]),
        ([("blocks.0.*",), ("*",)], [[MODULATION[0], BODIES[0]], [*MODULATION[1:], *BODIES[1:]]]),
        ([("*.f?", "blocks.1.modulation"), ("*",)], [[MODULATION[1], *BODIES], [MODULATION[0], MODULATION[2]]]),
        ([("*.FC",), ("*",)], [[], [*MODULATION, *BODIES]]),
        ([(), ("*",)], [[], [*MODULATION, *BODIES]]),
    ],
)
def test_layer_belongs_to_the_first_part_that_names_it(patterns: Any, expected: list[list[str]]) -> None:
    parts = [Calibration([], layers=own) for own in patterns]
    assert names_by_part([*MODULATION, *BODIES], parts) == expected


# What the caller can count on


@both_ways
@pytest.mark.parametrize("independent", [True, False])
def test_part_without_layers_of_interest_is_passed_over(independent: bool, propagate: str) -> None:
    def never() -> Iterator[Any]:
        pytest.fail("asked for batches")
        yield

    model, layers = model_and_layers()
    spare = Calibration(never(), layers=("nothing", "embed"), independent=independent)
    last = Calibration(never(), independent=independent)
    units = list(part_statistics(model, layers, [spare, *two_parts(), last], InputNorm, propagate=propagate))
    assert sorted(name for unit in units for name in unit) == sorted(layers)


@both_ways
def test_batches_are_iterated_over_once_and_one_part_is_held_at_a_time(propagate: str) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    started = []

    def lazily(part: Calibration) -> Iterator[Any]:
        assert not alive, "batches of another part are held"
        started.append(part.layers)
        for given in part.batches:
            batch = copy.deepcopy(given)
            alive.update(batch if isinstance(batch, tuple) else [batch])
            yield batch
            del batch
            if part.independent:
                assert len(alive) <= 1

    model, layers = model_and_layers()
    parts = [replace(part, batches=lazily(part)) for part in two_parts()]
    for unit in part_statistics(model, layers, parts, InputNorm, propagate=propagate):
        assert unit
    assert len(started) == 2
    assert not alive


@both_ways
@pytest.mark.parametrize("ending", ["end", "closed", "error"])
def test_training_flags_are_restored(propagate: str, ending: str) -> None:
    model, layers = model_and_layers()
    model.train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    stream = part_statistics(model, layers, two_parts(), InputNorm, propagate=propagate)
    for i, _ in enumerate(stream):
        assert torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        if i == 2 and ending == "closed":
            stream.close()
        elif i == 2 and ending == "error":
            with pytest.raises(KeyError):
                stream.throw(KeyError)
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@both_ways
def test_layers_stay_in_their_mode_when_pruned(propagate: str) -> None:
    model, _ = model_and_layers()
    prune(model.train(), "wanda", calibration=two_parts(), exclude=["embed"], propagate=propagate)
    assert all(module.training for module in model.modules())


def test_independent_part_runs_each_batch_once() -> None:
    model, layers = model_and_layers()
    seen: list[int] = []
    part = two_parts()[0]

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(len(batch))
        part.forward(model, batch)
        part.forward(model, batch)  # a layer that is called twice is seen twice

    parts = [replace(part, forward=forward), two_parts()[1]]
    unit = next(part_statistics(model, layers, parts, InputNorm, propagate="pruned"))
    assert seen == [20, 30]
    assert {one.rows for one in unit.values()} == {100}


# Bad input


@both_ways
def test_layer_that_no_part_names(propagate: str) -> None:
    model, _ = model_and_layers()
    before = copy.deepcopy(model.state_dict())
    parts = [two_parts()[0], replace(two_parts()[1], layers=("blocks.[02].*",))]
    with pytest.raises(ConfigError, match=r"no part names layer 'blocks\.1\.fc'"):
        prune(model, "sparsegpt", calibration=parts, exclude=["embed"], propagate=propagate, update_weights=True)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), before.values(), strict=True))


@both_ways
@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("batches", [list, lambda: iter(())], ids=["list", "iterator"])
def test_part_without_batches(batches: Callable[[], Any], independent: bool, propagate: str) -> None:
    model, layers = model_and_layers()
    parts = two_parts()
    parts[0] = replace(parts[0], batches=batches(), independent=independent)
    with pytest.raises(DataError, match="no batches"):
        list(part_statistics(model, layers, parts, InputNorm, propagate=propagate))


@both_ways
@pytest.mark.parametrize("independent", [True, False])
def test_layer_that_its_part_never_reaches(independent: bool, propagate: str) -> None:
    model, layers = model_and_layers()
    parts = [replace(two_parts()[0], layers=("*.modulation", "blocks.2.fc"), independent=independent), two_parts()[1]]
    with pytest.raises(DataError, match=r"'blocks\.2\.fc' was never reached"):
        list(part_statistics(model, layers, parts, InputNorm, propagate=propagate))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("of", [list, tuple])
def test_parts_among_batches(of: Callable[[list[Any]], Any]) -> None:
    model, _ = model_and_layers()
    for mixture in ([two_parts()[0], torch.randn(2, 8)], [torch.randn(2, 8), two_parts()[0]]):
        with pytest.raises(ConfigError, match="both parts and batches"):
            prune(model, "wanda", calibration=of(mixture))


@pytest.mark.parametrize("parts", [two_parts, lambda: two_parts()[1]], ids=["parts", "one part"])
def test_forward_beside_parts(parts: Callable[[], Any]) -> None:
    model, _ = model_and_layers()
    with pytest.raises(ConfigError, match="forward is given, but each part"):
        prune(model, "wanda", calibration=parts(), forward=whole)


@pytest.mark.parametrize("calibration", [[], ()])
def test_nothing_at_all(calibration: Any) -> None:
    with pytest.raises(DataError, match="no batches"):
        prune(model_and_layers()[0], "wanda", calibration=calibration, exclude=["embed"])


# Diagnostics


@pytest.mark.parametrize("lazy", [False, True])
def test_output_errors_are_measured_on_the_batches_of_the_layers_own_part(lazy: bool) -> None:
    model, layers = model_and_layers()
    pattern, parts = NMPattern("2:4"), two_parts()
    masks = {name: pattern.topn_mask(torch.rand_like(layer.weight), name) for name, layer in layers.items()}
    given = [replace(part, batches=iter(part.batches)) for part in parts] if lazy else parts
    found = layer_diagnostics(model, MaskCheckpoint(pattern, masks, "ab" * 32, "wanda", {}, prior={}), given)
    inputs = inputs_by_part(model, parts, list(layers))
    assert [row[0] for row in found] == list(masks)  # the model's order, whatever the parts'
    for name, _, _, error in found:
        weight = layers[name].weight.detach().double()
        dense, sparse = inputs[name] @ weight.t(), inputs[name] @ (weight * masks[name]).t()
        assert float(error) == pytest.approx(float((dense - sparse).norm() / dense.norm()), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("parts", "error"), [(lambda: two_parts()[:1], ConfigError), (list, DataError)])
def test_diagnostics_of_a_layer_that_no_part_names(parts: Callable[[], Any], error: type) -> None:
    model, layers = model_and_layers()
    masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
    checkpoint = MaskCheckpoint(NMPattern("2:4"), masks, "ab" * 32, "wanda", {}, prior={})
    with pytest.raises(error, match="calibration: no"):
        layer_diagnostics(model, checkpoint, parts())
