"""Masks of several layers drawn in one call: the same masks and gradients as one by one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from import_graph import ROOT
from regression import Regression, learnable, logits, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskllm4v.config import load_experiment
from maskllm4v.sparsity import joined
from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.sparsity.joined import JoinedDraw, join_draws
from maskllm4v.sparsity.layers import LearnableMaskedLinear, dense_weight
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameters import learnable_masks, masked_parameters
from maskllm4v.sparsity.surgery import make_learnable, set_noise_key
from maskllm4v.tasks.classification.task import Classification
from maskllm4v.training.mask_learning import learn_masks

WIDTHS = (32, 64, 32, 96)  # groups in multiples of 64: see joined


def join_layers(layers: Iterable[nn.Module]) -> list[JoinedDraw]:
    return join_draws([one for layer in layers for one in masked_parameters(layer).values()])


def net(pattern: str = "2:4", widths: Sequence[int] = WIDTHS, **how: Any) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise((*widths, 32))))
    make_learnable(model, None, pattern=pattern, seed=5, **how)
    set_noise_key(model, NoiseKey(5, 7, 1, 2))
    for layer in learnable_masks(model).values():
        layer.tau, layer.scaling = 0.7, 10.0
    return model.train()


def gradients(model: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)) -> Any:
    """Outputs, and the gradients by all logits of a loss that has Σ(masked weight)² in it."""
    model.zero_grad()
    outputs = run(model, x)
    layers = learnable_masks(model).values()
    draws = {layer.joined for layer in layers if layer.joined is not None}
    energies = [layer.kept_energy for layer in layers if layer.joined is None] + [draw.energy for draw in draws]
    (outputs.square().mean() - 0.3 * torch.stack(energies).sum()).backward()
    return outputs.detach(), {name: layer.logits.grad.clone() for name, layer in learnable_masks(model).items()}


def equal(found: Any, wanted: Any) -> None:
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("gate", ["candidates", "positions"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_joined_layers_are_what_they_are_alone(pattern: str, gate: str, hard: bool) -> None:
    model, x = net(pattern, gate=gate, hard=hard), torch.randn(5, WIDTHS[0])
    alone = gradients(model, x)
    (draw,) = join_layers(model)
    assert len(draw.masks) == 4
    equal(gradients(model, x), alone)


@pytest.mark.parametrize("gate", ["candidates", "positions"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_exact_tables_keep_their_bits(pattern: str, gate: str) -> None:
    """Two steps of the digits' model."""
    experiment = load_experiment(ROOT / "experiments" / "digits.yaml")
    found = []
    for join in (False, True):
        model = Classification(experiment.task_spec()).build_model(0)
        make_learnable(model, None, pattern=pattern, exclude=["head"], gate=gate, seed=1)
        draws = join_layers([model]) if join else []
        assert len(draws) == join
        masks, x = learnable_masks(model.train()), torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.AdamW([mask.logits for mask in masks.values()], lr=0.01, fused=True)
        for step in range(2):
            set_noise_key(model, NoiseKey(1, step))
            for mask in masks.values():
                mask.tau, mask.scaling = 4.0 - 3 * step, 10.0 + step
            outputs, grads = gradients(model, x)
            optimizer.step()
        found.append((outputs, grads))
    equal(*found)


@pytest.mark.parametrize("gate", ["candidates", "positions"])
def test_any_number_of_groups(gate: str) -> None:
    model, x = net("2:4", (12, 20, 4, 28), gate=gate), torch.randn(5, 12)
    alone = gradients(model, x)
    join_layers(model)
    found = gradients(model, x)
    torch.testing.assert_close(found[0], alone[0], rtol=1e-5, atol=1e-6)
    for name, wanted in alone[1].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_energy_is_the_sum_of_the_layers() -> None:
    model, x = net(), torch.randn(5, WIDTHS[0])
    model(x)
    alone = sum(layer.kept_energy.item() for layer in model)
    (draw,) = join_layers(model)
    model(x)
    assert draw.energy.item() == pytest.approx(alone, rel=1e-6)
    assert all(layer.kept_energy is None for layer in model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_weights_are_written_as_products_read_them(dtype: torch.dtype) -> None:
    model, x = net(), torch.randn(5, WIDTHS[0])

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x).float()

    alone = gradients(model, x, run)
    join_layers(model)
    equal(gradients(model, x, run), alone)


def test_weights_that_are_trained_get_their_gradients() -> None:
    model, x = net(), torch.randn(5, WIDTHS[0])
    for layer in model:
        dense_weight(layer).requires_grad_()
    gradients(model, x)
    alone = [dense_weight(layer).grad.clone() for layer in model]
    join_layers(model)
    gradients(model, x)
    assert all(torch.equal(dense_weight(layer).grad, grad) for layer, grad in zip(model, alone, strict=True))


def test_a_layer_that_runs_twice_has_one_mask() -> None:
    model, x = net(), torch.randn(5, WIDTHS[0])
    shared = LearnableMaskedLinear.from_linear(nn.Linear(32, 32), name="again")
    shared.train().draw, shared.auto_advance = NoiseKey(5, 7), False
    shared.tau, shared.scaling = 0.7, 10.0

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(shared(shared(x)))

    def learn() -> list[Tensor]:
        for layer in (shared, *model):
            layer.logits.grad = None
        run(model, x).square().mean().backward()
        return [layer.logits.grad for layer in (shared, *model)]

    alone = learn()
    join_layers([shared, *model])
    assert all(torch.equal(a, b) for a, b in zip(learn(), alone, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_draw_the_same_again(reentrant: bool) -> None:
    model, x = net(), torch.randn(5, WIDTHS[0], requires_grad=True)

    def learn(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        run(x).square().mean().backward()
        return [layer.logits.grad.clone() for layer in model]

    alone = learn(model)
    join_layers(model)
    found = learn(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_each_draw_is_new_and_each_mode_its_own() -> None:
    model, x = net(), torch.randn(5, WIDTHS[0])
    join_layers(model)
    first = model(x)
    set_noise_key(model, NoiseKey(5, 8))
    second = model(x)
    assert not torch.equal(first, second)
    set_noise_key(model, NoiseKey(5, 7, 1, 2))
    assert torch.equal(model(x), first)
    with torch.no_grad():
        assert torch.equal(model(x), first)
    assert model(x).requires_grad  # a draw without a graph serves no training
    for layer in model:
        layer.tau = 4.0
    assert not torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), copy.deepcopy(net().eval())(x))


def test_layers_that_move_on_by_themselves_move_together() -> None:
    one, other, x = net(), net(), torch.randn(5, WIDTHS[0])
    join_layers(other)
    for model in (one, other):
        for layer in model:
            layer.draw, layer.auto_advance = NoiseKey(1), True
    assert all(torch.equal(one(x), other(x)) for _ in range(3))


def test_one_temperature_for_all() -> None:
    model, x = net(), torch.randn(5, WIDTHS[0])
    join_layers(model)
    model[2].tau = 3.0
    with pytest.raises(ValueError, match="one tau and one scaling"):
        model(x)


def test_parted_layers_hold_no_graph() -> None:
    model, x = net(), torch.randn(5, WIDTHS[0])
    (draw,) = join_layers(model)
    model(x)
    draw.part()
    assert all(layer.joined is None for layer in model)
    assert draw.energy is None
    copy.deepcopy(model)  # refuses tensors with a graph
    model(x)
    assert all(layer.kept_energy is not None for layer in model)


# Which layers


def sizes(draws: list[JoinedDraw]) -> list[list[int]]:
    return [[layer.logits.shape[1] for layer in draw.masks] for draw in draws]


def test_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "CPU_GROUPS", 100)
    layers = [LearnableMaskedLinear(4, groups) for groups in (60, 50, 101, 30, 100, 50, 8)]
    assert sizes(join_layers(layers)) == [[60, 30, 8], [50, 50]]
    assert [layer.joined is not None for layer in layers] == [True, True, False, True, False, True, True]


def test_only_what_is_alike_is_joined() -> None:
    kinds: list[dict[str, Any]] = [{}, {"hard": True}, {"gate": "positions"}, {"N": 1}, {"N": 4, "M": 8}]
    layers = [LearnableMaskedLinear(16, 4, **how) for how in (*kinds, *kinds)]
    layers += [LearnableMaskedLinear(16, 4).double(), LearnableMaskedLinear(16, 4).double()]
    for backend in ("chunked", "chunked", "compiled", "compiled"):
        layers.append(LearnableMaskedLinear(16, 4))
        layers[-1].backend = backend
    masks = [layer.weight_mask for layer in layers]
    found = {frozenset(masks.index(mask) for mask in draw.masks) for draw in join_layers(layers)}
    assert found == {frozenset({i, i + 5}) for i in range(5)} | {frozenset({10, 11}), frozenset({12, 13})}


def test_learning_joined_is_learning_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn() -> nn.Module:
        model = learnable()
        learn_masks(model, Regression(), settings(distillation=0.3, accumulate=2))
        return model

    calls = []
    real = joined.masked_weight
    monkeypatch.setattr(joined, "masked_weight", lambda *args, **how: calls.append(how["sizes"]) or real(*args, **how))
    together = learn()
    assert calls
    monkeypatch.setattr("maskllm4v.training.mask_learning.join_draws", lambda weights: [])
    alone = learn()
    assert all(torch.equal(tensor, logits(alone)[name]) for name, tensor in logits(together).items())
    assert all(layer.joined is None for layer in learnable_masks(together).values())


@pytest.mark.parametrize("changes", [{"compile": True}, {"grad_checkpointing": True}])
def test_compiled_and_recomputed_models_draw_one_by_one(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from maskllm4v.training.mask_learning import MaskLearner

    def learner(**how: Any) -> MaskLearner:
        return MaskLearner(
            learnable(),
            Regression(),
            settings(**how),
            prior=None,
            row="row",
            on_point=None,  # type: ignore[arg-type]
        )

    assert learner().joined
    assert not learner(**changes).joined
    monkeypatch.setattr("maskllm4v.training.mask_learning.world_size", lambda: 2)
    assert not learner().joined


# The operation


def test_sizes_have_to_be_those_of_keys_and_logits() -> None:
    weight, values = torch.randn(5, 4), torch.randn(6, 5)
    candidates, keys = net()[0].candidates, torch.zeros(2, 2, dtype=torch.int64)
    for key, parts in ((keys, [5]), (keys, [2, 2]), (None, [5])):
        with pytest.raises(ValueError, match="groups"):
            masked_weight(weight, values, candidates, tau=1.0, scaling=1.0, key=key, sizes=parts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_parts_cover_a_span_once(counts: list[int], data: st.DataObject) -> None:
    sampling = Sampling(1.0, 1.0, joined=tuple((count, (i, 0)) for i, count in enumerate(counts)))
    owners = [(i, group) for i, count in enumerate(counts) for group in range(count)]
    start = data.draw(st.integers(0, len(owners) - 1))
    stop = data.draw(st.integers(start + 1, len(owners)))
    seen: dict[int, tuple[int, int]] = {}
    for part, (layer, _), first in sampling.parts(slice(start, stop)):
        for place in range(part.start, part.stop):
            assert place not in seen
            seen[place] = (layer, first + place - part.start)
    assert [seen[place] for place in range(stop - start)] == owners[start:stop]
