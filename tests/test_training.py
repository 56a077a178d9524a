"""The loops that train masks and dense models, on a task without images."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from maskllm4v.config import DenseSettings, LearningSettings, parse_experiment
from maskllm4v.dense import obtain_dense, train_dense
from maskllm4v.errors import CheckpointError, TrainingError
from maskllm4v.patterns import NMPattern
from maskllm4v.randomness import philox_key, uniforms
from maskllm4v.surgery import current_masks, learnable_layers, make_learnable
from maskllm4v.training import CURVE_COLUMNS, Learned, learn_masks

NAMES = ("0", "2")
Batch = tuple[Tensor, Tensor]


class Regression:
    """Random features and the answers of a random linear map; eight steps an epoch.

    Args:
        nan_at: the step at which the loss is NaN.
        bad: what it is then.
    """

    data_digest = ""

    def __init__(self, *, nan_at: int | None = None, bad: float = math.nan, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.map = torch.randn(16, 4, generator=generator).to(dtype)
        self.nan_at, self.bad, self.dtype = nan_at, bad, dtype
        self.steps_taken = self.losses = 0
        self.modes: list[list[bool]] = []
        self.teachers: list[tuple[Tensor, Tensor, Tensor, float]] = []
        self.last: Any = None

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(self.dtype).eval()

    def train_batches(self, *, seed: int, batch_size: int, steps: int, start: int = 0) -> Iterator[Batch]:
        for step in range(start, steps):
            self.steps_taken = step
            features = torch.randn(batch_size, 16, generator=torch.Generator().manual_seed(1000 * seed + step))
            yield features.to(self.dtype), features.to(self.dtype) @ self.map

    def steps_per_epoch(self, batch_size: int) -> int:
        return 8

    def calibration_batches(self, batch_size: int) -> Iterator[Batch]:
        return self.train_batches(seed=99, batch_size=batch_size, steps=2)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        self.modes.append([module.training for module in model.modules()])
        self.last = batch
        outputs: Tensor = model(batch[0])
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.losses += 1
        value = F.mse_loss(outputs, batch[1])
        return value * self.bad if self.steps_taken == self.nan_at else value

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        self.teachers.append((self.last[0], outputs.detach().clone(), teacher.clone(), temperature))
        return F.mse_loss(outputs, teacher) * temperature

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}


def settings(**changes: Any) -> LearningSettings:
    return LearningSettings(**{"steps": 12, "batch_size": 32, "lr": 0.05, "min_lr": 0.01, "log_every": 5, **changes})


def learnable(model: nn.Module | None = None, *, seed: int = 0, init: Any = "prior", **options: Any) -> nn.Module:
    """The task's model with learnable masks that start at a random prior (of :func:`priors`)."""
    model = Regression().build_model(0) if model is None else model
    return make_learnable(model, priors(), pattern="2:4", init=init, seed=seed, **options)


def priors() -> dict[str, Tensor]:
    """The first two of every four: not what the magnitudes say."""
    first = torch.tensor([True, True, False, False])
    return {"0": first.repeat(8, 4), "2": first.repeat(4, 2)}


def logits(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.logits.detach().clone() for name, layer in learnable_layers(model).items()}


def column(learned: Learned, name: str) -> list[float]:
    return [point[CURVE_COLUMNS.index(name)] for point in learned.curve]


def trained(task: Regression | None = None, *, seed: int = 0, **changes: Any) -> tuple[nn.Module, Learned]:
    model = learnable(seed=seed)
    return model, learn_masks(model, task or Regression(), settings(**changes), seed=seed)


def soft_mask(layer_logits: Tensor, *, name: str, seed: int, step: int, tau: float, scaling: float) -> Tensor:
    """[groups, 4], written out from Eq. 5-7."""
    candidates = torch.zeros(6, 4, dtype=layer_logits.dtype)
    for k, kept in enumerate(itertools.combinations(range(4), 2)):
        candidates[k, list(kept)] = 1
    noise = uniforms(philox_key(seed, "gumbel", name, step, 0, 0), 0, *layer_logits.shape).to(layer_logits)
    gumbel = -torch.log(-torch.log(noise))
    return torch.softmax((layer_logits * scaling + gumbel) / tau, 0).t() @ candidates


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


class Noisy(nn.Sequential):
    """With dropout, which draws from torch's own generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4))


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
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    learnable(model)
    task = Regression()
    learn_masks(model, task, settings(distillation=0.5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[1].state_dict().items())
    # student: all but the normalisation train; teacher: nothing does
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
        energy = learnable_layers(model)[name].weight.square()
        most = energy.reshape(-1, 4).topk(2, 1).values.sum()
        kept = {key: (energy * mask[name]).sum() / most for key, mask in (("l", learned.masks), ("p", priors()))}
        assert kept["l"] > 0.9
        assert kept["p"] < 0.8


# The optimiser


def by_hand(
    run: LearningSettings, names: tuple[str, ...], steps: int, seed: int
) -> tuple[dict[str, Tensor], list[Any]]:
    """MaskLLM in float64, from its formulas and Loshchilov & Hutter's AdamW; also (loss, norm, energy) a step."""
    task, model = Regression(dtype=torch.float64), learnable(seed=seed).double()
    layers = learnable_layers(model)
    current = {name: layers[name].logits.detach().clone() for name in names}
    first = {name: torch.zeros_like(value) for name, value in current.items()}
    second = {name: torch.zeros_like(value) for name, value in current.items()}
    found = []
    dense_energy = sum(layers[name].weight.square().sum().item() for name in names)
    for step, (x, y) in enumerate(task.train_batches(seed=seed, batch_size=run.batch_size, steps=steps)):
        share = step / max(run.steps - 1, 1)
        lr = run.min_lr + (run.lr - run.min_lr) * (1 + math.cos(math.pi * share)) / 2
        tau, scaling = ((1 - share) * pair[0] + share * pair[1] for pair in (run.tau, run.scaling))
        leaves = {name: value.clone().requires_grad_() for name, value in current.items()}
        weights = {}
        for name, leaf in leaves.items():
            mask = soft_mask(leaf, name=name, seed=seed, step=step, tau=tau, scaling=scaling)
            weights[name] = layers[name].weight * mask.reshape(layers[name].weight.shape)
        outputs = torch.relu(x @ weights["0"].t() + layers["0"].bias) @ weights["2"].t() + layers["2"].bias
        loss = (outputs - y).square().mean()
        energy = torch.stack([weight.square().sum() for weight in weights.values()]).sum()
        gradients = torch.autograd.grad(loss - run.regularisation * energy, list(leaves.values()))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        factor = min(1.0, run.clip_grad / (norm + 1e-6)) if run.clip_grad else 1.0
        for name, gradient in zip(names, gradients, strict=True):
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
    wanted, _ = by_hand(run, NAMES, 1, 3)
    for name, value in logits(model).items():
        assert torch.allclose(value.double(), wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
def test_many_steps_and_their_curve_are_the_formulas(clip_grad: float) -> None:
    run = settings(steps=6, regularisation=0.05, clip_grad=clip_grad, **OPTIONS)
    model = learnable(seed=3).double()
    learned = learn_masks(model, Regression(dtype=torch.float64), run, seed=3)
    wanted, points = by_hand(run, NAMES, 6, 3)
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


# Averages


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.99])
def test_final_logits_are_the_average(decay: float) -> None:
    model = learnable()
    states = [logits(model)]
    learn_masks(model, Regression(), settings(ema=decay, log_every=1), on_point=lambda _: states.append(logits(model)))
    assert len(states) == 13
    for name, found in logits(model).items():
        average = states[0][name].double()
        for step, state in enumerate(states[1:]):
            d = min(decay, (1 + step) / (10 + step))
            average = d * average + (1 - d) * state[name].double()
        assert torch.allclose(found.double(), average, rtol=0, atol=1e-5)
        assert not torch.allclose(found, states[-1][name], rtol=0, atol=1e-4)


def test_average_does_not_change_the_training() -> None:
    curves = [trained(ema=decay)[1].curve for decay in (0.0, 0.9)]
    assert curves[0] == curves[1]


# Distillation


def test_full_distillation_asks_the_dense_model_and_no_label() -> None:
    task = Regression()
    dense = copy.deepcopy(task.build_model(0)).eval()
    trained(task, distillation=1.0, distillation_temperature=3.0)
    assert task.losses == 0
    assert len(task.teachers) == 12
    for features, outputs, teacher, temperature in task.teachers:
        assert torch.equal(teacher, dense(features).detach())
        assert not torch.equal(outputs, teacher)
        assert temperature == 3.0


def test_no_distillation_asks_no_teacher() -> None:
    task = Regression()
    trained(task)
    assert (task.losses, task.teachers) == (12, [])


def test_half_distillation_is_the_mean_of_both() -> None:
    losses = [column(trained(distillation=share, steps=1)[1], "loss")[0] for share in (0.0, 0.25, 1.0)]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-6)
    assert losses[0] != losses[2]


def test_distillation_brings_the_outputs_to_the_teachers() -> None:
    task = Regression()
    _, learned = trained(task, distillation=1.0, steps=150, lr=0.1, batch_size=64, log_every=10)
    losses = column(learned, "loss")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


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


@pytest.mark.parametrize("given", [False, True])
def test_shares_are_counted_over_all_groups(given: bool) -> None:
    model = learnable(init="magnitude")
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


# Failures


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 3, 5, 11])
def test_first_bad_step_is_named(step: int, bad: float) -> None:
    with pytest.raises(TrainingError, match=f"^my-row, seed 7: the loss is not finite at step {step}$"):
        learn_masks(learnable(), Regression(nan_at=step, bad=bad), settings(), seed=7, row="my-row")


def test_run_stops_at_the_next_point() -> None:
    task = Regression(nan_at=3)
    with pytest.raises(TrainingError):
        learn_masks(learnable(), task, settings())
    assert task.steps_taken == 5


def test_nothing_learnable_is_an_error() -> None:
    task = Regression()
    with pytest.raises(TrainingError, match="my-row: the model has no learnable mask"):
        learn_masks(task.build_model(0), task, settings(), row="my-row")
    assert not task.modes


# Dense training

DENSE = DenseSettings(row="dense", init="scratch", steps=60, batch_size=32, lr=0.02)


def test_dense_training_lowers_the_loss_and_ends_in_evaluation_mode() -> None:
    task = Regression()
    model = task.build_model(0)
    batch = next(iter(task.calibration_batches(256)))
    before = task.loss(model(batch[0]), batch).item()
    train_dense(model, task, DENSE, seed=0)
    assert task.loss(model(batch[0]), batch).item() < 0.6 * before
    assert not any(module.training for module in model.modules())


def test_dense_training_is_adamw_with_warm_up_and_cosine() -> None:
    run = DENSE.model_copy(update={"steps": 5, "warmup": 0.4, "clip_grad": 0.5, "betas": (0.8, 0.9)})
    task = Regression(dtype=torch.float64)
    model, reference = task.build_model(0), task.build_model(0)
    train_dense(model, task, run, seed=2)
    parameters = list(reference.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step, (x, y) in enumerate(task.train_batches(seed=2, batch_size=32, steps=5)):
        gradients = torch.autograd.grad((reference(x) - y).square().mean(), parameters)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        lr = 0.02 * (1 + math.cos(math.pi * step / 5)) / 2 * min(1.0, (step + 1) / 2)
        with torch.no_grad():
            for p, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
                gradient = gradient * min(1.0, 0.5 / (norm + 1e-6))
                m.mul_(0.8).add_(0.2 * gradient)
                v.mul_(0.9).add_(0.1 * gradient**2)
                update = m / (1 - 0.8 ** (step + 1)) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
                p.copy_(p * (1 - lr * run.weight_decay) - lr * update)
    for found, wanted in zip(model.parameters(), parameters, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [Regression().build_model, lambda _: Noisy()], ids=["plain", "dropout"])
def test_seed_decides_every_bit_of_the_dense_model(kind: Callable[[int], nn.Module]) -> None:
    found = []
    for seed, state in ((0, 0), (0, 1), (1, 0)):
        model = kind(0)
        torch.manual_seed(state)
        train_dense(model, Regression(), DENSE.model_copy(update={"steps": 4}), seed=seed)
        found.append([parameter.tolist() for parameter in model.parameters()])
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 7, 50, 59])
def test_diverging_dense_training_names_row_seed_and_step(step: int, bad: float) -> None:
    task = Regression(nan_at=step, bad=bad)
    with pytest.raises(TrainingError, match=f"^dense, seed 4: the loss is not finite at step {step}$"):
        train_dense(task.build_model(0), task, DENSE, seed=4)


def experiment(**dense: Any) -> Any:
    return parse_experiment(
        {
            "table": "t",
            "title": "T",
            "seeds": [0],
            "data": {"name": "d", "source": "digits"},
            "model": {"name": "VisionTransformer"},
            "dense": {"row": "dense", **dense},
            "rows": {"dense": "Dense"},
        }
    )


def test_dense_model_comes_from_a_plain_file(tmp_path: Path) -> None:
    task = Regression()
    saved = task.build_model(5)
    path = tmp_path / "plain.safetensors"
    save_file(saved.state_dict(), path)
    found = obtain_dense(experiment(init="checkpoint", checkpoint=str(path)), task, 0)
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in found.state_dict().items())
    path.write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"plain\.safetensors"):
        obtain_dense(experiment(init="checkpoint", checkpoint=str(path)), task, 0)


def test_dense_file_of_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"0.weight": torch.ones(8, 16)}, path)
    with pytest.raises(CheckpointError, match=r"plain\.safetensors does not fit the model"):
        obtain_dense(experiment(init="checkpoint", checkpoint=str(path)), Regression(), 0)


def test_dense_model_is_trained_from_its_seed() -> None:
    task = Regression()
    found = obtain_dense(experiment(init="scratch", steps=3), task, 2)
    wanted = task.build_model(2)
    train_dense(wanted, task, DenseSettings(row="dense", init="scratch", steps=3), seed=2)
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in found.state_dict().items())
