"""Seconds that one row of a table takes for one seed, data loading aside; see :mod:`benchmarks.table_cost`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Timing, interleaved, synchronize
from benchmarks.workloads import RandomNoise, random_task
from maskllm4v.config import Experiment, FinetunedSettings, LearnedSettings
from maskllm4v.oneshot.permute import permute_channels_
from maskllm4v.oneshot.prune import calibrates, prune
from maskllm4v.oneshot.weight_update import update_weights_
from maskllm4v.sparsity.surgery import make_learnable
from maskllm4v.training.finetuning import WeightLearner
from maskllm4v.training.mask_learning import MaskLearner
from maskllm4v.training.trainer import TrainTarget, run

# Nothing of it changes how long a step takes, so rows that differ in nothing else are measured once.
TIMELESS = {"steps", "epochs", "prior", "init", "prior_strength", "gate_std", "lr", "min_lr", "start"}


class Rows:
    """Measures the rows of one experiment.

    Args:
        experiment: the table.
        device: where to compute.
        repeats: repetitions: of a pruning or an update, and of ``log_every`` steps of a training.
        quick: few steps and calibration images.
    """

    def __init__(self, experiment: Experiment, device: torch.device, *, repeats: int, quick: bool) -> None:
        self.experiment, self.repeats, self.quick = experiment, repeats, quick
        self.task = random_task(experiment, device, calibration=16 if quick else None)
        self._steps: dict[str, Timing] = {}  # seconds a step, by settings

    def cost(self, row: str) -> dict[str, float | int]:
        """``seconds``, the median, and ``n``, of a row that is not dense; none for masks that another row has."""
        kind = self.experiment.row(row).kind
        if kind == "updated" and not self.experiment.row(row).updates_weights:
            return {"seconds": 0.0, "n": 0}
        if kind == "oneshot":
            timing, factor = self._time(row, self._model, self._prune), 1
        elif kind == "updated":
            timing, factor = self._time(row, partial(self._masked, row), self._update), 1
        else:
            training: Any = (self.experiment.learned if kind == "learned" else self.experiment.finetuned)[row]
            masked = self.experiment.row(row).pattern
            key = f"{kind} {masked} {training.model_dump(exclude=TIMELESS)}"
            if key not in self._steps:
                self._steps[key] = self._train(row, training)
            timing, factor = self._steps[key], training.total_steps(self.task.steps_per_epoch(training.batch_size))
        seconds = factor * timing.median
        sources: dict[str, Any] = {**self.experiment.learned, **self.experiment.updated}
        if row in sources and sources[row].inputs == "generated":
            seconds += self._time_samples(row).median
        return {"seconds": seconds, "n": timing.n}

    def _time_samples(self, row: str) -> Timing:
        """Making the samples that a row learns or calibrates from."""
        assert isinstance(self.task, RandomNoise)
        make = partial(self.task.samples, self._model(), 0)
        return interleaved({row: make}, repeats=1 if self.quick else self.repeats, warmup=0)[row]

    def _model(self) -> nn.Module:
        return self.task.build_model(0)

    def _time(self, row: str, start: Callable[[], nn.Module], change: Callable[[nn.Module, str], Any]) -> Timing:
        """Changing a model that somebody has started to make."""
        models = [start() for _ in range(1 + self.repeats)]  # before the clock starts
        return interleaved({row: lambda: change(models.pop(), row)}, repeats=self.repeats)[row]

    def _masked(self, row: str) -> nn.Module:
        """A model under the masks that those of a row go back to; which ones they are takes no time."""
        model = self._model()
        if (first := self.experiment.row(row).oneshot) is not None:
            self._prune(model, first.key)
        return model

    def _update(self, model: nn.Module, row: str) -> Any:
        settings = self.experiment.updated[row]
        return update_weights_(
            model,
            settings.update,
            calibration=self.task.calibration(settings.batch_size, 0),
            target=settings.target,
            damping=settings.damping,
        )

    def _prune(self, model: nn.Module, row: str) -> Any:
        settings, pattern = self.experiment.priors[row], self.experiment.row(row).pattern or ""
        layers: Any = {"exclude": self.experiment.model.excluded_layers, "on_misfit": self.experiment.model.on_misfit}
        if settings.permutation == "greedy":
            shown = self.task.calibration(settings.batch_size, 0) if calibrates(settings.method) else None
            permute_channels_(model, pattern, calibration=shown, **layers)
        return prune(
            model,
            settings.method,
            pattern=pattern,
            calibration=self.task.calibration(settings.batch_size, 0),
            update_weights=settings.update_weights,
            propagate=settings.propagate,
            **layers,
        )

    def _train(self, row: str, training: LearnedSettings | FinetunedSettings) -> Timing:
        """Seconds a step, in the training loop itself with all its bookkeeping."""
        model, start = self._model(), self.experiment.row(row).oneshot
        masks = None
        if start is not None:
            masks = self._prune(model if row in self.experiment.finetuned else self._model(), start.key)
        learner: TrainTarget
        if isinstance(training, LearnedSettings):
            how = training.model_dump(include={"init", "hard", "gate"})
            make_learnable(model, masks, pattern=self.experiment.row(row).pattern or "", **how)
            teacher = self._model().eval() if training.weights == "updated" else None
            learner = MaskLearner(model, self.task, training, prior=masks, row=row, on_point=None, teacher=teacher)
        else:
            learner = WeightLearner(model, self.task, training, row=row, ema=training.ema, new=False)
        block = 2 if self.quick else training.log_every  # one point of the curve a block
        settings = training.model_copy(update={"steps": (1 + self.repeats) * block, "epochs": None, "log_every": block})
        ends = _clocked(learner)
        run(learner, self.task, settings, seed=0)
        marks = ends[block - 1 :: block]  # the first block warms up
        return Timing.of((after - before) / block for before, after in itertools.pairwise(marks))


def _clocked(learner: TrainTarget) -> list[float]:
    """The times at which the learner's steps will have ended."""
    ends: list[float] = []
    end_step: Callable[[int], None] = learner.end_step

    def clocked(step: int) -> None:
        end_step(step)
        synchronize()
        ends.append(time.perf_counter())

    learner.end_step = clocked  # type: ignore[method-assign]
    return ends
