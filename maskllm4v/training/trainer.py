"""The training loop: whatever is trained, on one process or many, interrupted or not.

What is trained, and by which loss, a :class:`TrainTarget` knows; batches come from a
:class:`~maskllm4v.tasks.base.Task`; precision and processes are the :class:`~maskllm4v.training.engine.Engine`'s.
The loop never waits for the device in a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.config import TrainingSettings
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.tasks.base import Objective, Task
from maskllm4v.training.cost import Clock, Cost
from maskllm4v.training.engine import Engine
from maskllm4v.training.first_step import FirstStep
from maskllm4v.training.nonfinite import NonFiniteGuard
from maskllm4v.training.optim import LearningRate
from maskllm4v.training.resume import Resume, stopping
from maskllm4v.training.schedule import progress
from maskllm4v.training.weighing import weighed
from maskllm4v.utils.distributed import mean, same_everywhere
from maskllm4v.utils.errors import CheckpointError, DataError
from maskllm4v.utils.processes import is_main, rank, world_size
from maskllm4v.utils.progress import bar
from maskllm4v.utils.rng import seeded_steps
from maskllm4v.utils.sharding import WHOLE, BatchShard


class TrainTarget(ABC):
    """What a loop trains.

    Attributes:
        row: its name in messages.
        model: the model, on its device.
        tensors: the parameters that are trained.
        optimizer: of these.
    """

    row: str
    model: nn.Module
    tensors: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def train_mode(self) -> None:
        """Put the model's modules into the modes that they are trained in."""

    @abstractmethod
    def loss(self, model: nn.Module, task: Objective, batch: Any) -> tuple[Tensor, Tensor]:
        """What is minimised, and the loss to report; ``model`` may be a wrapper of the learner's own."""

    def begin_step(self, step: int, done: float, lr: float) -> None:  # noqa: B027
        """Before a step; ``done`` is how much of the run lies behind it, from 0 to 1."""

    def begin_micro_step(self, draw: NoiseKey) -> None:  # noqa: B027
        """Before a micro-batch; ``draw`` says which noise it gets."""

    def end_step(self, step: int) -> None:  # noqa: B027
        """After the optimiser's step."""

    def log(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:  # noqa: B027
        """A point of the training curve."""

    def points(self, first: int = 0) -> list[tuple[float, ...]]:
        """The training curve from its ``first``-th point on; empty where none is kept. Waits for the device."""
        return []

    def end_epoch(self, step: int) -> None:  # noqa: B027
        """After the last step of an epoch, and of the run."""

    def state(self) -> dict[str, Any]:
        """What has to be saved next to parameters and optimiser."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`state` gave."""


def run(
    learner: TrainTarget,
    task: Task,
    settings: TrainingSettings,
    *,
    seed: int,
    position: int = 0,
    resume: Resume | None = None,
    phases: tuple[tuple[Task, int], ...] = (),
    watch: Callable[[list[tuple[float, ...]]], None] | None = None,
) -> Cost:
    """Train from the first step, or from the last state saved, to the end.

    Args:
        learner: what is trained.
        task: gives batches and loss.
        settings: budget, optimiser, precision.
        seed: of order, augmentation and noise.
        position: line of the progress bar.
        resume: where the state is kept; None: nowhere.
        phases: tasks that give the first batches, each up to a step; ``task`` gives the rest.
        watch: given the points of the curve in the main process: first those restored, then each as it is taken.

    Raises:
        ConfigError: device or model cannot do what ``amp`` or ``grad_checkpointing`` asks for.
        DataError: an epoch has no step, or a step no batch.
        TrainingError: the first step does not use a mask, or the loss stopped being finite; names row and layers, or
            row, seed and step.
        CheckpointError: the state is damaged or belongs to other settings.
        SystemExit, KeyboardInterrupt: on SIGTERM or SIGINT, after the state was saved.
    """
    device = learner.tensors[0].device
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # see pick_device
    steps_per_epoch = task.steps_per_epoch(settings.batch_size)
    if steps_per_epoch < 1:
        raise DataError(
            f"{learner.row}: an epoch has no step; learning.batch_size is {settings.batch_size}, found less"
        )
    steps = settings.total_steps(steps_per_epoch)
    engine = Engine(learner.model, learner.tensors, learner.optimizer, settings)
    rate = LearningRate(learner.optimizer, settings, steps)
    start = _restore(learner, engine, resume)
    shard = BatchShard.of(rank(), world_size(), settings.accumulate)
    divided = {} if shard == WHOLE else {"shard": shard}  # a task for one process need not know it
    learner.train_mode()
    finite, scaled = NonFiniteGuard(device), engine.scaler.is_enabled()
    seen = _Watching(learner, watch if is_main() else None)
    clock = Clock(settings.batch_size, device)
    with (
        closing(_batches(task, phases, start, steps, seed=seed, batch_size=settings.batch_size, **divided)) as batches,
        closing(FirstStep(learner.row, learner.model, device, compiled=settings.compile)) as first,
        engine.wrapped() as model,
        seeded_steps(device, seed) as seed_step,
        stopping() as stop,
    ):
        name = f"{learner.row}, seed {seed}"
        for step in bar(range(start, steps), name, total=steps, initial=start, position=position):
            done = progress(step, steps, steps_per_epoch, settings.anneal)
            lr = rate.set(step, done)
            learner.begin_step(step, done, lr)
            total = torch.zeros((), device=device)
            missing = f"{name}: the task has no batch for step {step} of {steps}"
            minimised, parts = weighed(task, _fetched(batches, settings.accumulate, missing), device)
            # A batch is fetched before the seed is set: a loader that starts draws from torch's generator.
            for micro, batch in enumerate(parts):
                last = micro == settings.accumulate - 1
                seed_step(step, micro, rank())
                learner.begin_micro_step(NoiseKey(seed, step, micro, rank()))
                with engine.micro_step(model, last=last):
                    objective, loss = learner.loss(model, minimised, batch)
                    if last:
                        first.after_forward()
                    engine.backward(objective / settings.accumulate)
                total += loss.detach() / settings.accumulate
            first.after_backward()
            norm = engine.clip()
            finite.watch(step, total, torch.zeros_like(total) if scaled else norm)  # the scaler skips such a step
            engine.step()
            learner.end_step(step)
            if step % settings.log_every == 0 or step == steps - 1:
                learner.log(step, lr, mean(total), norm.detach())
                finite.check(learner.row, seed)
                seen.update()
            clock.tick()
            if (step + 1) % steps_per_epoch == 0 or step == steps - 1:
                learner.end_epoch(step)
            if resume is not None and (stop or step == steps - 1 or resume.due(step)) and is_main():
                finite.check(learner.row, seed)
                resume.save(_state(learner, engine, step + 1))
            if stop and is_main():  # the others end with it: they may be waiting for its gradients
                stop.leave()
    learner.model.eval()
    return clock.cost()


def _batches(
    task: Task, phases: tuple[tuple[Task, int], ...], start: int, steps: int, **options: Any
) -> Generator[Any]:
    for other, end in (*phases, (task, steps)):
        if start < min(end, steps):
            yield from other.train_batches(start=start, steps=min(end, steps), **options)
            start = end


def _fetched(batches: Iterator[Any], count: int, missing: str) -> Iterator[Any]:
    """The next micro-batches, one at a time; raises :class:`DataError` where there are fewer."""
    for _ in range(count):
        if (batch := next(batches, None)) is None:
            raise DataError(missing)
        yield batch


def _state(learner: TrainTarget, engine: Engine, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tensors": [tensor.detach() for tensor in learner.tensors],
        "optimizer": learner.optimizer.state_dict(),
        "scaler": engine.scaler.state_dict(),
        "learner": learner.state(),
    }


def _restore(learner: TrainTarget, engine: Engine, resume: Resume | None) -> int:
    """Take back the last state saved; returns the step to go on with."""
    state = None if resume is None else resume.load(engine.device)
    step = 0 if state is None else int(state["step"])
    if same_everywhere(step, engine.device) != step:
        raise CheckpointError(f"process {rank()} does not see the saved state; all need one shared folder")
    if state is None:
        return 0
    with torch.no_grad():
        for tensor, saved in zip(learner.tensors, state["tensors"], strict=True):
            tensor.copy_(saved)
    learner.optimizer.load_state_dict(state["optimizer"])
    engine.scaler.load_state_dict(state["scaler"])
    learner.load_state(state["learner"])
    return step


class _Watching:
    """Hands on the points of a curve that were taken since the last time."""

    def __init__(self, learner: TrainTarget, watch: Callable[[list[tuple[float, ...]]], None] | None) -> None:
        self._learner, self._watch, self._count = learner, watch, 0
        self.update()

    def update(self) -> None:
        if self._watch is not None:
            points = self._learner.points(self._count)
            self._count += len(points)
            self._watch(points)
