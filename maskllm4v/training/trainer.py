"""The training loop: whatever is trained, on one process or many, interrupted or not.

Accelerate does mixed precision, gradient scaling and the averaging of gradients over processes. What is
trained, and by which loss, a :class:`TrainTarget` knows; batches come from a :class:`~maskllm4v.tasks.base.Task`.
The loop never waits for the device in a step.
"""

from __future__ import annotations

import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from maskllm4v.config import TrainingSettings
from maskllm4v.sparsity.masks import NoiseKey
from maskllm4v.tasks.base import Task
from maskllm4v.training.nonfinite import NonFiniteGuard
from maskllm4v.training.resume import Resume, stopping
from maskllm4v.training.schedule import cosine, progress, warm_up
from maskllm4v.utils.distributed import same_everywhere
from maskllm4v.utils.errors import CheckpointError, ConfigError
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
    def loss(self, model: nn.Module, task: Task, batch: Any) -> tuple[Tensor, Tensor]:
        """What is minimised, and the loss to report; ``model`` may be a wrapper of the learner's own."""

    def begin_step(self, step: int, share: float, lr: float) -> None:  # noqa: B027
        """Before a step; ``share`` is how much of the run is done, from 0 to 1."""

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


@dataclass(frozen=True)
class Cost:
    """What a run cost on its machine: never part of a record.

    Attributes:
        samples_per_second: without the first step of this process.
        peak_memory: bytes on the GPU, or of the whole process where there is none.
    """

    samples_per_second: float
    peak_memory: int


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
        TrainingError: the loss stopped being finite; names row, seed and step.
        CheckpointError: the state is damaged or belongs to other settings.
        SystemExit, KeyboardInterrupt: on SIGTERM or SIGINT, after the state was saved.
    """
    device = learner.tensors[0].device
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # see pick_device
    steps_per_epoch = task.steps_per_epoch(settings.batch_size)
    steps = settings.total_steps(steps_per_epoch)
    share = BatchShard.of(rank(), world_size(), settings.accumulate)
    accelerator = _accelerator(device, settings.amp)
    _set_up(learner.model, settings)
    finite, scaled, optimizer = NonFiniteGuard(device), accelerator.scaler is not None, learner.optimizer
    if scaled:  # else Accelerate's wrapper only costs time: it searches for packages and signatures in every step
        optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    initial_lr = [group["lr"] for group in optimizer.param_groups]
    start = _restore(learner, accelerator, resume, device)
    divided = {} if share == WHOLE else {"share": share}  # a task for one process need not know it
    learner.train_mode()
    seen = _Watching(learner, watch if is_main() else None)
    clock = _Clock(settings.batch_size, device)
    with (
        closing(_batches(task, phases, start, steps, seed=seed, batch_size=settings.batch_size, **divided)) as batches,
        _prepared(accelerator, learner.model, settings.compile) as model,
        seeded_steps(device, seed) as seed_step,
        stopping() as stop,
    ):
        name = f"{learner.row}, seed {seed}"
        for step in bar(range(start, steps), name, total=steps, initial=start, position=position):
            done = progress(step, steps, steps_per_epoch, settings.anneal)
            factor = warm_up(step, round(settings.warmup * steps))
            lr = cosine(settings.lr, settings.min_lr, done) * factor
            for group, first in zip(optimizer.param_groups, initial_lr, strict=True):
                group["lr"] = lr if first == settings.lr else first * (lr / settings.lr)
            learner.begin_step(step, done, lr)
            total = torch.zeros((), device=device)
            for micro in range(settings.accumulate):
                batch = next(batches)  # before the seed is set: a loader that starts draws from torch's generator
                seed_step(step, micro, rank())
                learner.begin_micro_step(NoiseKey(seed, step, micro, rank()))
                last = micro == settings.accumulate - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    objective, loss = learner.loss(model, task, batch)
                    accelerator.backward(objective / settings.accumulate)
                total += loss.detach() / settings.accumulate
            norm = accelerator.clip_grad_norm_(learner.tensors, settings.clip_grad or float("inf"))
            finite.watch(step, total, torch.zeros_like(total) if scaled else norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            learner.end_step(step)
            if step % settings.log_every == 0 or step == steps - 1:
                learner.log(step, lr, accelerator.reduce(total, "mean"), norm.detach())
                finite.check(learner.row, seed)
                seen.update()
            clock.tick()
            if (step + 1) % steps_per_epoch == 0 or step == steps - 1:
                learner.end_epoch(step)
            if resume is not None and (stop or step == steps - 1 or resume.due(step)) and is_main():
                finite.check(learner.row, seed)
                resume.save(_state(learner, accelerator, step + 1))
            if stop and is_main():  # the others end with it: they may be waiting for its gradients
                stop.leave()
    if settings.grad_checkpointing:
        _checkpoint_activations(learner.model, on=False)
    learner.model.eval()
    return clock.cost()


def optimizer_for(tensors: list[nn.Parameter], settings: TrainingSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW, or timm's optimiser of that name over the model's trainable parameters.

    Raises:
        ConfigError: timm knows no such optimiser, or not these arguments.
    """
    name, arguments = settings.optimizer, {"betas": settings.betas, **settings.optimizer_args}
    if name != "adamw":
        from timm.optim import create_optimizer_v2, list_optimizers

        if name not in list_optimizers():
            raise ConfigError(f"optimizer is {name!r}; allowed: {', '.join(list_optimizers())}")
    try:
        if name == "adamw":
            return torch.optim.AdamW(
                tensors, lr=settings.lr, weight_decay=settings.weight_decay, fused=True, **arguments
            )
        return create_optimizer_v2(model, name, settings.lr, settings.weight_decay, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_args do not fit {name!r}: {error}") from error


def _accelerator(device: torch.device, amp: str) -> Accelerator:
    if amp == "fp16" and device.type == "cpu":
        raise ConfigError("amp is 'fp16', which CPUs do not train in; allowed there: 'no', 'bf16'")
    AcceleratorState._reset_state()  # precision may differ from the run before it in this process
    return Accelerator(cpu=device.type == "cpu", mixed_precision=amp, device_placement=False)


@contextmanager
def _prepared(accelerator: Accelerator, model: nn.Module, compiled: bool) -> Iterator[nn.Module]:
    """The model for mixed precision and several processes; afterwards it is what it was.

    Accelerate marks a model and wraps its ``forward`` in place, and takes only a part of that back.
    """
    patched = ("forward", "_original_forward", "_is_accelerate_prepared", "_is_torch_compile")
    own = {name: model.__dict__[name] for name in patched if name in model.__dict__}
    try:
        yield accelerator.prepare_model(torch.compile(model) if compiled else model, device_placement=False)
    finally:
        for name in patched:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)


def _set_up(model: nn.Module, settings: TrainingSettings) -> None:
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.grad_checkpointing:
        _checkpoint_activations(model, on=True)


def _checkpoint_activations(model: Any, *, on: bool) -> None:
    """Compute activations again in backward, block by block, if the model is one of timm's or diffusers'."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(on)
    elif hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
    else:
        raise ConfigError("grad_checkpointing is on, but the model has no set_grad_checkpointing (timm's have)")


def _batches(
    task: Task, phases: tuple[tuple[Task, int], ...], start: int, steps: int, **options: Any
) -> Generator[Any]:
    for other, end in (*phases, (task, steps)):
        if start < min(end, steps):
            yield from other.train_batches(start=start, steps=min(end, steps), **options)
            start = end


def _state(learner: TrainTarget, accelerator: Accelerator, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tensors": [tensor.detach() for tensor in learner.tensors],
        "optimizer": learner.optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "learner": learner.state(),
    }


def _restore(learner: TrainTarget, accelerator: Accelerator, resume: Resume | None, device: torch.device) -> int:
    """Take back the last state saved; returns the step to go on with."""
    state = None if resume is None else resume.load(device)
    step = 0 if state is None else int(state["step"])
    if same_everywhere(step, device) != step:
        raise CheckpointError(f"process {rank()} does not see the saved state; all need one shared folder")
    if state is None:
        return 0
    with torch.no_grad():
        for tensor, saved in zip(learner.tensors, state["tensors"], strict=True):
            tensor.copy_(saved)
    learner.optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
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


class _Clock:
    """Counts what a run costs, from the end of its first step on."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self.first: float | None = None
        self.ticks = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def tick(self) -> None:
        if self.first is None:
            self.first = self._now()
        else:
            self.ticks += 1

    def cost(self) -> Cost:
        seconds = self._now() - self.first if self.first is not None else 0.0
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Cost(self.ticks * self.batch_size / seconds if self.ticks else 0.0, memory)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
