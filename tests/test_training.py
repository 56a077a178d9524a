"""Masks that are learned: what changes, by which formulas, and the curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from regression import NAMES, Noisy, Normalised, Regression, column, learnable, logits, priors, settings, trained
from torch import Tensor, nn

from maskllm4v.config import LearningSettings
from maskllm4v.sparsity.layers import dense_weight
from maskllm4v.sparsity.parameterization import GATES
from maskllm4v.sparsity.parameters import current_masks
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.surgery import make_learnable
from maskllm4v.training.mask_learning import CURVE_COLUMNS, MaskResult, learn_masks
from maskllm4v.training.resume import Resume
from maskllm4v.utils.errors import TrainingError
from maskllm4v.utils.rng import philox_key, uniforms


def soft_mask(layer_logits: Tensor, draw: tuple[str, int, int, int], *, tau: float, scaling: float) -> Tensor:
    """[groups, 4], written out from Eq. 5-7; ``draw``: layer, seed, step and micro-step.

    Four logits are the positions': a candidate's logit and noise are their sums.
    """
    name, seed, step, micro = draw
    candidates = torch.zeros(6, 4, dtype=layer_logits.dtype)
    for k, kept in enumerate(itertools.combinations(range(4), 2)):
        candidates[k, list(kept)] = 1
    noise = uniforms(philox_key(seed, "gumbel", name, step, micro, 0), 0, *layer_logits.shape).to(layer_logits)
    gumbel = -torch.log(-torch.log(noise))
    z = (layer_logits * scaling + gumbel) / tau
    return torch.softmax(candidates @ z if len(z) == 4 else z, 0).t() @ candidates


# What changes, and what does not


@pytest.mark.parametrize("hard", [False, True])
def test_loss_goes_down_and_masks_are_valid(hard: bool) -> None:
    # A model that knows the answer, but for every second pair of inputs, which it hears as noise.
    task = Regression()
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    wanted = torch.tensor([False, True, True, False]).repeat(4, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.where(wanted, 1.0, 2.0) * torch.randn(4, 16).sign())
        task.map = (model[0].weight * wanted).t().clone()
    prior = {"0": priors()["0"][:4]}
    make_learnable(model, prior, pattern="2:4", hard=hard)
    changes = {"steps": 150, "batch_size": 64, "lr": 0.1, "min_lr": 0.01, "log_every": 10, "regularisation": 0.0}
    learned = learn_masks(model, task, settings(**changes))
    losses = column(learned, "loss")
    assert sum(losses[-3:]) < 0.1 * sum(losses[:3])
    assert torch.equal(learned.masks["0"], wanted)


def test_only_logits_change() -> None:
    model = learnable()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn_masks(model, Regression(), settings())
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (not name.endswith("logits")), name


def test_masks_are_those_of_the_model_left_in_evaluation_mode() -> None:
    model, learned = trained()
    assert not any(module.training for module in model.modules())
    assert learned.masks.keys() == set(NAMES)
    for name, mask in current_masks(model).items():
        assert torch.equal(mask, learned.masks[name])
        assert NMPattern("2:4").is_valid(mask)


@pytest.mark.parametrize("kind", [Regression().build_model, lambda _: Noisy()], ids=["plain", "dropout"])
def test_seed_decides_every_bit(kind: Callable[[int], nn.Module]) -> None:
    found = []
    for seed, state in ((0, 0), (0, 1), (1, 0)):
        model = learnable(kind(0), seed=0)
        torch.manual_seed(state)
        curve = learn_masks(model, Regression(), settings(), seed=seed).curve
        found.append((torch.cat([tensor.flatten() for tensor in logits(model).values()]).tolist(), curve))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_masks_are_trained_in_training_mode() -> None:
    task = Regression()
    trained(task)
    assert len(task.modes) == 12
    assert all(all(modes) for modes in task.modes)


def test_running_statistics_stay_as_they_were() -> None:
    model = Normalised()
    before = model.statistics()
    learnable(model)
    task = Regression(scores=(1.0, 2.0))
    learn_masks(model, task, settings(distillation=0.5, select="best"))
    assert all(torch.equal(*pair) for pair in zip(model.statistics(), before, strict=True))
    # student: all but the normalisation train, after an evaluation too; teacher: nothing does
    assert task.modes == [[True, True, False, True], [False] * 4] * 12


def test_regulariser_keeps_more_energy() -> None:
    kept = {}
    for strength in (0.0, 10.0):
        _, learned = trained(steps=60, regularisation=strength, lr=0.1)
        kept[strength] = column(learned, "kept_energy")
    assert kept[10.0][-1] > kept[10.0][0] + 0.1
    assert kept[10.0][-1] > kept[0.0][-1] + 0.1


def test_strong_regulariser_keeps_nearly_all_energy_that_two_of_four_can_keep() -> None:
    model, learned = trained(steps=200, regularisation=100.0, lr=0.1, tau=(1.0, 1.0), scaling=(2.0, 2.0))
    for name in NAMES:
        energy = dense_weight(model.get_submodule(name)).square()
        most = energy.reshape(-1, 4).topk(2, 1).values.sum()
        kept = {key: (energy * mask[name]).sum() / most for key, mask in (("l", learned.masks), ("p", priors()))}
        assert kept["l"] > 0.9
        assert kept["p"] < 0.8


# The optimiser


def by_hand(
    run: LearningSettings, steps: int, seed: int, gate: str = "candidates"
) -> tuple[dict[str, Tensor], list[tuple[float, ...]]]:
    """MaskLLM in float64, from its formulas and Loshchilov & Hutter's AdamW; also the columns of its curve."""
    task, model = Regression(dtype=torch.float64), learnable(seed=seed, gate=gate).double()
    layers = {name: model.get_submodule(name) for name in NAMES}
    current = {name: layers[name].logits.detach().clone() for name in NAMES}
    first = {name: torch.zeros_like(value) for name, value in current.items()}
    second = {name: torch.zeros_like(value) for name, value in current.items()}
    found = []
    dense_energy = sum(dense_weight(layers[name]).square().sum().item() for name in NAMES)
    for step, batch in enumerate(task.train_batches(seed=seed, batch_size=run.batch_size, steps=steps)):
        share = step / max(steps - 1, 1)
        lr = run.min_lr + (run.lr - run.min_lr) * (1 + math.cos(math.pi * share)) / 2
        tau, scaling = ((1 - share) * pair[0] + share * pair[1] for pair in (run.tau, run.scaling))
        leaves = {name: value.clone().requires_grad_() for name, value in current.items()}
        losses, energies = [], []
        for micro in range(run.accumulate):
            x, y = (tensor.chunk(run.accumulate)[micro] for tensor in batch)
            weights = {}
            for name, leaf in leaves.items():
                mask = soft_mask(leaf, (name, seed, step, micro), tau=tau, scaling=scaling)
                weights[name] = dense_weight(layers[name]) * mask.reshape(dense_weight(layers[name]).shape)
            outputs = torch.relu(x @ weights["0"].t() + layers["0"].bias) @ weights["2"].t() + layers["2"].bias
            losses.append((outputs - y).square().mean())
            energies.append(torch.stack([weight.square().sum() for weight in weights.values()]).sum())
        loss, energy = (torch.stack(values).mean() for values in (losses, energies))
        gradients = torch.autograd.grad(loss - run.regularisation * energy, list(leaves.values()))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        factor = min(1.0, run.clip_grad / (norm + 1e-6)) if run.clip_grad else 1.0
        for name, gradient in zip(NAMES, gradients, strict=True):
            gradient = gradient * factor
            (b1, b2), t = run.betas, step + 1
            first[name] = b1 * first[name] + (1 - b1) * gradient
            second[name] = b2 * second[name] + (1 - b2) * gradient**2
            update = first[name] / (1 - b1**t) / ((second[name] / (1 - b2**t)).sqrt() + 1e-8)
            current[name] = current[name] * (1 - lr * run.weight_decay) - lr * update
        found.append((loss.item(), norm, energy.item() / dense_energy, lr, tau, scaling))
    return current, found


OPTIONS = {"tau": (4.0, 0.5), "scaling": (2.0, 5.0), "betas": (0.8, 0.9), "weight_decay": 0.3, "log_every": 1}


def test_one_step_is_adamw() -> None:
    run = settings(steps=1, lr=1e-2, regularisation=0.01, **OPTIONS)
    model = learnable(seed=3)
    learn_masks(model, Regression(), run, seed=3)
    wanted, _ = by_hand(run, 1, 3)
    for name, value in logits(model).items():
        assert torch.allclose(value.double(), wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("clip_grad", "accumulate"), [(0.0, 1), (0.1, 1), (0.1, 2), (0.0, 4)])
def test_many_steps_and_their_curve_are_the_formulas(clip_grad: float, accumulate: int, gate: str) -> None:
    run = settings(steps=6, regularisation=0.05, clip_grad=clip_grad, accumulate=accumulate, **OPTIONS)
    model = learnable(seed=3, gate=gate).double()
    learned = learn_masks(model, Regression(dtype=torch.float64), run, seed=3)
    wanted, points = by_hand(run, 6, 3, gate)
    for name, value in logits(model).items():
        assert torch.allclose(value, wanted[name], rtol=0, atol=1e-9)
    assert max(norm for _, norm, *_ in points) > 0.1  # clipping had something to do
    columns = ("loss", "grad_norm", "kept_energy", "lr", "tau", "scaling")
    for number, name in enumerate(columns):
        assert column(learned, name) == pytest.approx([point[number] for point in points], rel=1e-5), name


def test_epochs_anneal_once_each() -> None:
    _, learned = trained(steps=20, anneal="epoch", log_every=1, tau=(4.0, 2.0), scaling=(10.0, 30.0))
    # epochs of 8, 8 and 4 steps
    assert column(learned, "tau") == pytest.approx([4.0] * 8 + [3.0] * 8 + [2.0] * 4)
    assert column(learned, "scaling") == pytest.approx([10.0] * 8 + [20.0] * 8 + [30.0] * 4)
    assert column(learned, "lr") == pytest.approx([0.05] * 8 + [0.03] * 8 + [0.01] * 4)


def test_nothing_is_annealed_in_a_run_of_one_epoch() -> None:
    _, learned = trained(steps=8, anneal="epoch", log_every=1)
    for name, first in (("tau", 4.0), ("scaling", 10.0), ("lr", 0.05)):
        assert column(learned, name) == pytest.approx([first] * 8)


# The curve


@pytest.mark.parametrize(
    ("steps", "log_every", "expected"),
    [(12, 5, [0, 5, 10, 11]), (11, 5, [0, 5, 10]), (1, 10, [0]), (3, 1, [0, 1, 2]), (4, 100, [0, 3])],
)
def test_points_of_the_curve(steps: int, log_every: int, expected: list[int]) -> None:
    seen: list[int] = []
    learned = learn_masks(
        learnable(), Regression(), settings(steps=steps, log_every=log_every), on_point=lambda step: seen.append(step)
    )
    assert column(learned, "step") == expected == seen
    assert all(len(point) == len(CURVE_COLUMNS) for point in learned.curve)
    assert (
        *("step", "loss", "lr", "tau", "scaling"),
        *("max_probability", "off_prior", "flipped", "grad_norm", "kept_energy"),
    ) == CURVE_COLUMNS


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("given", [False, True])
def test_shares_are_counted_over_all_groups(given: bool, gate: str) -> None:
    model = learnable(init="magnitude", gate=gate)
    start = current_masks(model)
    reference = priors() if given else start
    snapshots: list[dict[str, Tensor]] = []
    learned = learn_masks(
        model,
        Regression(),
        settings(lr=0.3, log_every=4),
        prior=priors() if given else None,
        on_point=lambda _: snapshots.append(logits(model)),
    )
    candidates = [list(kept) for kept in itertools.combinations(range(4), 2)]
    last = start
    scalings = [10 + 90 * step / 11 for step in (0, 4, 8, 11)]
    for number, (state, scaling) in enumerate(zip(snapshots, scalings, strict=True)):
        off = flipped = 0
        top = []
        masks = {}
        for name in NAMES:
            mask = torch.zeros(state[name].shape[1], 4, dtype=torch.bool)
            for group, values in enumerate(state[name].t().tolist()):
                if gate == "positions":
                    values = [sum(values[j] for j in kept) for kept in candidates]
                mask[group, candidates[values.index(max(values))]] = True
                weights = [math.exp(scaling * (value - max(values))) for value in values]
                top.append(max(weights) / sum(weights))
                off += not torch.equal(mask[group], reference[name].reshape(-1, 4)[group])
                flipped += not torch.equal(mask[group], last[name].reshape(-1, 4)[group])
            masks[name] = mask
        groups = 8 * 4 + 4 * 2
        assert len(top) == groups
        assert column(learned, "off_prior")[number] == pytest.approx(off / groups)
        assert column(learned, "flipped")[number] == pytest.approx(flipped / groups)
        assert column(learned, "max_probability")[number] == pytest.approx(sum(top) / groups, rel=1e-4)
        last = masks
    assert column(learned, "flipped")[1] > 0
    assert given or column(learned, "off_prior")[-1] != column(learned, "flipped")[-1]


# Interrupted


@pytest.mark.parametrize("gate", GATES)
def test_interrupted_run_ends_with_the_same_bits(gate: str, tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 7:
            raise InterruptedError

    def run(name: str, on_point: Callable[[int], None] | None) -> tuple[MaskResult, dict[str, Tensor]]:
        model, options = learnable(gate=gate), settings(ema=0.9, log_every=1)
        resume = Resume(tmp_path / name, 0, {"gate": gate}, steps=5)
        learned = learn_masks(model, Regression(), options, prior=priors(), resume=resume, on_point=on_point)
        return learned, logits(model)

    whole, wanted = run("whole", None)
    with pytest.raises(InterruptedError):
        run("parts", stop)
    parts, found = run("parts", None)
    assert parts.curve == whole.curve
    assert sum(column(whole, "flipped")) > 0
    for name in NAMES:
        assert torch.equal(found[name], wanted[name])
        assert torch.equal(parts.masks[name], whole.masks[name])


# The best on the held-out slice


@pytest.mark.parametrize(
    ("scores", "best"), [((1.0, 3.0, 2.0), 15), ((5.0, 3.0, 2.0), 7), ((0.0, 1.0, 2.0), 19), ((2.0, 2.0, 1.0), 7)]
)
def test_best_logits_are_left(scores: tuple[float, ...], best: int) -> None:
    task, model = Regression(scores=scores), learnable()
    states: list[dict[str, Tensor]] = []
    run = settings(steps=20, log_every=1, select="best")
    learned = learn_masks(model, task, run, on_point=lambda _: states.append(logits(model)))
    for name, found in logits(model).items():
        assert torch.equal(found, states[best][name])
        assert torch.equal(learned.masks[name], current_masks(model)[name])
    # asked once an epoch of eight steps, and at the end; never of the reported split
    assert [split for split, _ in task.asked] == ["holdout"] * 3
    for (_, seen), step in zip(task.asked, (7, 15, 19), strict=True):
        assert all(torch.equal(seen[name], states[step][name]) for name in NAMES)


def test_best_of_averages_is_an_average() -> None:
    last, best = Regression(), Regression(scores=(1.0, 2.0))
    model, learned = trained(best, steps=16, ema=0.9, select="best", log_every=1)
    other, same = trained(last, steps=16, ema=0.9, log_every=1)
    assert learned.curve == same.curve  # looking at held-out images changes nothing
    for name in NAMES:
        assert torch.equal(logits(model)[name], logits(other)[name])
        assert torch.equal(best.asked[1][1][name], logits(model)[name])
    assert last.asked == []


# Nothing to learn


def test_nothing_learnable_is_an_error() -> None:
    task = Regression()
    with pytest.raises(TrainingError, match="my-row: the model has no learnable mask"):
        learn_masks(task.build_model(0), task, settings(), row="my-row")
    assert not task.modes
