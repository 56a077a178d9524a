"""Training weights: all of a dense model's, or those that a fixed mask keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.config import DenseSettings, FinetunedSettings, TrainingSettings
from maskllm4v.tasks.base import Objective, Task, train_mode
from maskllm4v.training.averaging import Average
from maskllm4v.training.cost import Cost
from maskllm4v.training.mask_learning import freeze_statistics
from maskllm4v.training.optim import optimizer_for
from maskllm4v.training.resume import Resume
from maskllm4v.training.trainer import TrainTarget, run

CURVE_COLUMNS = ("step", "loss", "lr", "grad_norm")


class WeightLearner(TrainTarget):
    """Trains every parameter of a model by the task's loss.

    Args:
        model: dense, or with :class:`~maskllm4v.MaskedLinear` layers, whose pruned weights get no gradient.
        task: gives batches and loss.
        settings: optimiser.
        row: name in messages.
        ema: decay of the weights' average; 0: off.
        new: trained from initial weights; otherwise running statistics (batch norm) stay as they are.
    """

    def __init__(
        self, model: nn.Module, task: Task, settings: TrainingSettings, *, row: str, ema: float = 0.0, new: bool = True
    ) -> None:
        self.row, self.model, self.task, self.new = row, model, task, new
        self.tensors = list(model.parameters())
        self.optimizer = optimizer_for(self.tensors, settings, model)
        self.average = Average(self.tensors, ema)
        self.scalars: list[tuple[int, float]] = []
        self.measured: list[Tensor] = []

    def train_mode(self) -> None:
        train_mode(self.task, self.model)
        if not self.new:
            freeze_statistics(self.model)

    def loss(self, model: nn.Module, task: Objective, batch: Any) -> tuple[Tensor, Tensor]:
        loss = task.loss(task.forward(model, batch), batch)
        return loss, loss

    def end_step(self, step: int) -> None:
        self.average.update()

    def log(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        self.scalars.append((step, lr))
        self.measured.append(torch.stack([loss.float(), grad_norm.float()]))

    def points(self, first: int = 0) -> list[tuple[float, ...]]:
        """In the order of :data:`CURVE_COLUMNS`."""
        measured = torch.stack(self.measured[first:]).tolist() if self.measured[first:] else []
        scalars = self.scalars[first:]
        return [(step, loss, lr, norm) for (step, lr), (loss, norm) in zip(scalars, measured, strict=True)]

    def state(self) -> dict[str, Any]:
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if self.new}
        return {"average": self.average.values, "buffers": buffers, "curve": [self.scalars, self.measured]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.average.values = state["average"]
        with torch.no_grad():
            for name, buffer in state["buffers"].items():
                self.model.get_buffer(name).copy_(buffer)
        scalars, self.measured = state["curve"]
        self.scalars = [(int(step), float(lr)) for step, lr in scalars]


def train_dense(
    model: nn.Module, task: Task, settings: DenseSettings, *, seed: int, position: int = 0, resume: Resume | None = None
) -> Cost:
    """Train a model from its initial weights, in place: warm-up, cosine, smaller images at first if asked to.

    Raises:
        TrainingError: the loss is not finite; names the step.
    """
    learner = WeightLearner(model, task, settings, row=settings.row)
    first = settings.progressive
    phases = () if first is None else ((task.resized(first.size), first.steps),)
    return run(learner, task, settings, seed=seed, position=position, resume=resume, phases=phases)


def finetune(
    model: nn.Module,
    task: Task,
    settings: FinetunedSettings,
    *,
    seed: int,
    row: str,
    position: int = 0,
    resume: Resume | None = None,
    watch: Callable[[list[tuple[float, ...]]], None] | None = None,
) -> tuple[list[tuple[float, ...]], Cost]:
    """Train a model's weights on, in place, its masks, if it has any, fixed.

    ``watch`` is as in :func:`maskllm4v.training.trainer.run`.

    Returns:
        The curve, in the order of :data:`CURVE_COLUMNS`, and what it cost.

    Raises:
        TrainingError: the loss is not finite; names the step.
    """
    learner = WeightLearner(model, task, settings, row=row, ema=settings.ema, new=False)
    cost = run(learner, task, settings, seed=seed, position=position, resume=resume, watch=watch)
    learner.average.swap()
    return learner.points(), cost
