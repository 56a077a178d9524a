"""Losses with weights: neither micro-batches nor processes change them, against the whole batch in float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from regression import Regression, logits, trained
from small_project import said, together
from torch import Tensor, nn
from weighed import STEPS, TASKS, Batch, Points, Weighed, build

from maskllm4v.config import FinetunedSettings, LearningSettings
from maskllm4v.sparsity.learnable import LearnableMask, NoiseKey
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.surgery import as_dense, make_learnable, set_noise_key
from maskllm4v.training.finetuning import finetune
from maskllm4v.training.mask_learning import MaskLearner, learn_masks
from maskllm4v.training.weighing import weighed
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.sharding import BatchShard

every_task = pytest.mark.parametrize("kind", TASKS)
COMMON: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "lr": 0.25,
    "min_lr": 0.25,
    "weight_decay": 0.0,
    "clip_grad": 0.0,
    "log_every": 1,
    "optimizer": "sgd",
    "optimizer_args": {"momentum": 0.0, "nesterov": False},
}
LR = {"weights": 0.25, "masks": 8.0}
LEARNING = LearningSettings(
    **{**COMMON, "lr": LR["masks"], "min_lr": LR["masks"]},
    distillation=0.25,
    distillation_temperature=2.0,
    regularisation=1e-3,
)


def descended(kind: str, accumulate: int) -> list[Tensor]:
    """Weights and losses after a few steps of plain gradient descent."""
    model = build()
    settings = FinetunedSettings(**COMMON, start="dense", accumulate=accumulate)
    curve, _ = finetune(model, TASKS[kind](), settings, seed=0, row="descent")  # type: ignore[arg-type]
    return [*(p.detach() for p in model.parameters()), torch.tensor([point[1] for point in curve])]


def learned(kind: str, accumulate: int) -> list[Tensor]:
    """Logits and losses of masks, every part of a step under the same noise, so that parts can be compared."""
    real = MaskLearner.begin_micro_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskLearner, "begin_micro_step", lambda self, draw: real(self, NoiseKey(0, draw.step)))
        model = make_learnable(build(), None, pattern="2:4")
        settings = LEARNING.model_copy(update={"accumulate": accumulate})
        found = learn_masks(model, TASKS[kind](), settings)  # type: ignore[arg-type]
    return [*logits(model).values(), torch.tensor([point[1] for point in found.curve])]


RUNS = {"weights": descended, "masks": learned}


def oracle(what: str, kind: str) -> list[Tensor]:
    """The same by autograd's gradient of the whole batch's loss, written down here."""
    task, model, losses = TASKS[kind](), build(), []
    share, temperature = LEARNING.distillation, LEARNING.distillation_temperature
    if what == "masks":
        make_learnable(model, None, pattern="2:4")
    masks: list[LearnableMask] = list(learnable_masks(model).values()) if what == "masks" else []
    tensors = [mask.logits for mask in masks] or list(model.parameters())
    for mask in masks:
        mask.train()
        mask.tau, mask.scaling = LEARNING.tau[0], LEARNING.scaling[0]
    for step in range(STEPS):
        batch = task.batch(step, 8)
        total = max(1, int((batch[1] != -1).sum()))
        if masks:
            done = step / (STEPS - 1)
            for mask in masks:
                mask.tau = LEARNING.tau[0] * (1 - done) + LEARNING.tau[1] * done
                mask.scaling = LEARNING.scaling[0] * (1 - done) + LEARNING.scaling[1] * done
            set_noise_key(model, NoiseKey(0, step))
            with torch.no_grad(), as_dense(model):
                teacher = task.forward(model, batch)
            outputs = task.forward(model, batch)
            distilled = task.distillation_loss(outputs, teacher, temperature, batch)
            loss = ((1 - share) * task.loss(outputs, batch) + share * distilled) / total
            energy = sum(mask.kept_energy for mask in masks if mask.kept_energy is not None)
            objective = loss - LEARNING.regularisation * energy
        else:
            objective = loss = task.loss(task.forward(model, batch), batch) / total
        losses.append(loss.detach())
        gradients = torch.autograd.grad(objective, tensors, allow_unused=True)
        with torch.no_grad():
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor -= LR[what] * (0 if gradient is None else gradient)
    return [*(tensor.detach() for tensor in tensors), torch.stack(losses)]


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-7)


@every_task
@pytest.mark.parametrize("what", RUNS)
@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_micro_batches_change_nothing(what: str, kind: str, accumulate: int) -> None:
    wanted = oracle(what, kind)
    assert max(float((a - b).abs().max()) for a, b in zip(wanted[:-1], start_of(what), strict=True)) > 0.01
    check(RUNS[what](kind, accumulate), wanted)


def start_of(what: str) -> list[Tensor]:
    if what == "masks":
        return list(logits(make_learnable(build(), None, pattern="2:4")).values())
    return [parameter.detach() for parameter in build().parameters()]


def _all_runs() -> None:
    found = {f"{w} {k} {n}": RUNS[w](k, n) for w in RUNS for k in TASKS for n in (1, 2)}
    torch.save(found, f"found-{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    assert together(tmp_path, _all_runs, processes=2) == [0, 0], said(tmp_path)
    first, second = (torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first) == len(second) == 8
    for key, tensors in first.items():
        what, kind, _ = key.split()
        check(tensors, oracle(what, kind))
        assert all(torch.equal(a, b) for a, b in zip(tensors, second[key], strict=True))


@pytest.mark.parametrize("what", RUNS)
def test_nothing_to_learn_from_is_no_division_by_zero(what: str) -> None:
    """The second step of points: a loss of exactly 0, and no gradient but that of the regulariser."""
    *_, losses = RUNS[what]("points", 2)
    assert losses[1] == 0
    assert torch.isfinite(losses).all()
    assert (losses[[0, 2]] > 0.1).all()


def test_mean_of_means_would_be_another_loss() -> None:
    """That parts of a step weigh as differently as the tests need it."""
    task = Points()
    parts = list(task.train_batches(seed=0, batch_size=8, steps=1, shard=BatchShard(2, range(2))))
    model = build()
    *losses, whole = (
        (task.loss(task.forward(model, part), part) / task.weight(part)).item() for part in (*parts, task.batch(0, 8))
    )
    assert abs(sum(losses) / 2 / whole - 1) > 0.01


# Tasks without weights


class Same(Regression):
    """Says that its batches weigh the same."""

    def weight(self, batch: Any) -> Tensor | None:
        return None


@pytest.mark.parametrize("changes", [{}, {"distillation": 0.5}, {"accumulate": 4, "regularisation": 0.01}])
def test_no_weight_is_as_without_the_method(changes: dict[str, Any]) -> None:
    (one, curve), (other, same) = trained(Regression(), **changes), trained(Same(), **changes)
    assert curve.curve == same.curve
    assert all(torch.equal(tensor, logits(other)[name]) for name, tensor in logits(one).items())


def test_a_task_without_weights_is_handed_on_as_it_is() -> None:
    task, batches = Regression(), iter([1, 2])
    assert weighed(task, batches, torch.device("cpu")) == (task, batches)
    assert list(batches) == [1, 2]


def test_weights_of_some_batches_only() -> None:
    task = Points()
    batches = task.train_batches(seed=0, batch_size=8, steps=1, shard=BatchShard(2, range(2)))
    weights = iter([torch.tensor(3), None])
    task.weight = lambda batch: next(weights)  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ConfigError, match="the task's weight is None for 1 of a step's 2 batches"):
        weighed(task, batches, torch.device("cpu"))


class Told(Weighed):
    """Writes down when a batch is fetched and when it is used."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def train_batches(self, **options: Any) -> Iterator[Batch]:
        for batch in super().train_batches(**options):
            self.told.append("fetched")
            yield batch

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        self.told.append("used")
        return super().forward(model, batch)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        return outputs["logits"].square().sum()


class Streamed(Told):
    weight = property()  # none: hasattr is false


@pytest.mark.parametrize(
    ("kind", "wanted"), [(Told, ["fetched"] * 4 + ["used"] * 4), (Streamed, ["fetched", "used"] * 4)]
)
def test_only_steps_with_weights_are_fetched_as_a_whole(kind: type[Told], wanted: list[str]) -> None:
    task = kind()
    settings = FinetunedSettings(**{**COMMON, "steps": 2}, start="dense", accumulate=4)
    finetune(build(), task, settings, seed=0, row="told")  # type: ignore[arg-type]
    assert task.told == 2 * wanted


# Modes


class Evaluated(Regression):
    """Learns masks as the model computes when it is used."""

    def learning_mode(self, model: nn.Module) -> None:
        model.eval()


def test_masks_are_learned_in_the_mode_that_the_task_says() -> None:
    task, plain = Evaluated(scores=(1.0, 2.0)), Regression(scores=(1.0, 2.0))
    for one, training in ((task, False), (plain, True)):
        trained(one, epochs=2, steps=None, select="best")  # an evaluation in between
        assert len(one.modes) == 16
        assert all(mode == [training] * len(mode) for mode in one.modes)


def test_weights_are_trained_in_training_mode_all_the_same() -> None:
    task = Evaluated()
    settings = FinetunedSettings(steps=2, batch_size=8, start="dense")
    finetune(task.build_model(0), task, settings, seed=0, row="tuned")  # type: ignore[arg-type]
    assert task.modes
    assert all(all(mode) for mode in task.modes)


def test_teacher_leaves_modes_alone() -> None:
    """Its outputs are those of the very model with its masks off, which is put into evaluation mode for them."""
    task = Evaluated()
    model, _ = trained(task, distillation=1.0)
    assert not any(any(mode) for mode in task.modes)
    for batch, _, teacher, _ in task.teachers:
        assert torch.equal(teacher, copy.deepcopy(task.build_model(0))(batch))
    assert not any(module.training for module in model.modules())
