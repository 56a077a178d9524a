"""Learning masks: frozen weights, trained logits (MaskLLM, arXiv 2409.17481).

It knows no images and no labels: a :class:`~maskllm4v.tasks.base.Task` runs the model and gives the loss.
Curves are kept on the device and fetched at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.config import LearningSettings
from maskllm4v.sparsity.joined import join_draws
from maskllm4v.sparsity.learnable import LearnableMask, NoiseKey
from maskllm4v.sparsity.parameters import MaskedParameter, current_masks, masked_parameters
from maskllm4v.sparsity.surgery import as_dense
from maskllm4v.sparsity.usage import has_compiled_parts
from maskllm4v.tasks.base import Objective, Task, learning_mode
from maskllm4v.training.averaging import Average
from maskllm4v.training.cost import Cost
from maskllm4v.training.optim import optimizer_for
from maskllm4v.training.resume import Resume
from maskllm4v.training.schedule import lerp
from maskllm4v.training.trainer import TrainTarget, run
from maskllm4v.utils.errors import TrainingError
from maskllm4v.utils.processes import world_size

CURVE_COLUMNS = (
    "step",
    "loss",  # without the regulariser
    "lr",
    "tau",
    "scaling",
    "max_probability",  # of softmax(s·l) over all masks: the chance of the likeliest one, mean over groups
    "off_prior",  # share of groups whose likeliest mask is not the prior's
    "flipped",  # share of groups whose likeliest mask changed since the last point
    "grad_norm",  # before clipping
    "kept_energy",  # Σ(soft masked weight)² / Σw²
)


@dataclass(frozen=True)
class MaskResult:
    """What learning gives: masks by layer name, a curve of :data:`CURVE_COLUMNS`, and what it cost."""

    masks: dict[str, Tensor]
    curve: list[tuple[float, ...]]
    cost: Cost


def learn_masks(
    model: nn.Module,
    task: Task,
    settings: LearningSettings,
    *,
    seed: int = 0,
    prior: Mapping[str, Tensor] | None = None,
    row: str = "masks",
    position: int = 0,
    teacher: nn.Module | None = None,
    resume: Resume | None = None,
    on_point: Callable[[int], None] | None = None,
    watch: Callable[[list[tuple[float, ...]]], None] | None = None,
) -> MaskResult:
    """Learn the masks of a model whose masks :func:`maskllm4v.make_learnable` has made learnable (arXiv 2409.17481).

    Args:
        model: left in evaluation mode, its logits trained (their average if ``settings.ema`` is on).
        task: gives batches and loss.
        settings: budget, optimiser, annealing, regularisation, distillation.
        seed: of order, augmentation and Gumbel noise.
        prior: masks to measure ``off_prior`` against; by default the initial arg-max masks.
        row: name in messages and on the progress bar.
        position: line of the progress bar.
        teacher: the dense model, in evaluation mode, for ``settings.distillation``; by default the very same model
            with its masks off, which is right as long as its weights are the dense ones.
        resume: where the state of an interrupted run is kept; None: nowhere.
        on_point: called with the step whenever a point of the curve has been taken.
        watch: given the points themselves, see :func:`maskllm4v.training.trainer.run`.

    Returns:
        Masks ``[out, in]`` by module name, points of the training curve, and what it cost.

    Raises:
        TrainingError: nothing is learnable, the first step does not use a mask or gives its logits no gradient, or
            the loss stopped being finite.
        CheckpointError: the state to resume from is damaged.
    """
    learner = MaskLearner(model, task, settings, prior=prior, row=row, on_point=on_point, teacher=teacher)
    cost = run(learner, task, settings, seed=seed, position=position, resume=resume, watch=watch)
    learner.finish()
    return MaskResult(current_masks(model), learner.points(), cost)


class MaskLearner(TrainTarget):
    """Trains the logits of all learnable masks of a model; see :func:`learn_masks`."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: LearningSettings,
        *,
        prior: Mapping[str, Tensor] | None,
        row: str,
        on_point: Callable[[int], None] | None,
        teacher: nn.Module | None = None,
    ) -> None:
        weights = {name: p for name, p in masked_parameters(model).items() if isinstance(p.mask, LearnableMask)}
        if not weights:
            raise TrainingError(f"{row}: the model has no learnable mask; call make_learnable first")
        self.row, self.model, self.task, self.settings = row, model, task, settings
        self.masks = [weight.learnable for weight in weights.values()]
        self.tensors = [mask.logits for mask in self.masks]
        # Not in compiled graphs, where calls cost little, nor where activations or gradients should go early.
        alone = settings.compile or settings.grad_checkpointing or world_size() > 1 or has_compiled_parts(model)
        self.joined = [] if alone else join_draws(weights.values())
        self.optimizer = optimizer_for(self.tensors, settings, model)
        self.average = Average(self.tensors, settings.ema)
        self.curve = _Curve(weights, prior)
        self.on_point, self.teacher = on_point, teacher
        self.energy = torch.zeros((), device=self.tensors[0].device)
        self.best_score, self.best_tensors = float("-inf"), list[Tensor]()
        self.tau, self.scaling = settings.tau[0], settings.scaling[0]

    def train_mode(self) -> None:
        """The task's mode for masks, but for layers with running statistics: those belong to the frozen dense model."""
        learning_mode(self.task, self.model)
        for mask in self.masks:
            mask.train()
        freeze_statistics(self.model)

    def begin_step(self, step: int, done: float, lr: float) -> None:
        self.tau, self.scaling = lerp(*self.settings.tau, done), lerp(*self.settings.scaling, done)
        for mask in self.masks:
            mask.tau, mask.scaling = self.tau, self.scaling
        self.energy = torch.zeros_like(self.energy)

    def begin_micro_step(self, draw: NoiseKey) -> None:
        for mask in self.masks:
            mask.draw, mask.auto_advance = draw, False

    def loss(self, model: nn.Module, task: Objective, batch: Any) -> tuple[Tensor, Tensor]:
        outputs = task.forward(model, batch)
        drawn = (*(mask.kept_energy for mask in self.masks), *(joined.energy for joined in self.joined))
        energies = [energy for energy in drawn if energy is not None]
        energy = torch.stack(energies).sum()  # Σ(masked weight)² over all weights
        share = self.settings.distillation
        loss = (1 - share) * task.loss(outputs, batch) if share < 1 else torch.zeros_like(energy)
        if share > 0:
            teacher = self._teacher(model, task, batch)
            temperature = self.settings.distillation_temperature
            loss = loss + share * task.distillation_loss(outputs, teacher, temperature, batch)
        self.energy += energy.detach() / self.settings.accumulate
        return loss - self.settings.regularisation * energy, loss

    def _teacher(self, model: nn.Module, task: Objective, batch: Any) -> Any:
        """The dense model's outputs: without a teacher those of the very same model with its masks off."""
        if self.teacher is not None:
            with torch.no_grad():
                return task.forward(self.teacher, batch)
        training = [module for module in model.modules() if module.training]
        model.eval()
        with torch.no_grad(), as_dense(self.model):
            outputs = task.forward(model, batch)
        for module in training:
            module.training = True
        return outputs

    def end_step(self, step: int) -> None:
        self.average.update()

    def log(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        self.curve.take((step, lr, self.tau, self.scaling), loss, grad_norm, self.energy)
        if self.on_point is not None:
            self.on_point(step)

    def points(self, first: int = 0) -> list[tuple[float, ...]]:
        """In the order of :data:`CURVE_COLUMNS`."""
        return self.curve.points(first)

    def end_epoch(self, step: int) -> None:
        """Remember the logits (averaged, if they are) that do best on the held-out slice."""
        if self.settings.select == "last":
            return
        self.average.swap()
        score = self.task.score(self.model, "holdout")
        if score > self.best_score:
            self.best_score, self.best_tensors = score, [tensor.detach().clone() for tensor in self.tensors]
        self.average.swap()
        self.train_mode()

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the logits in the model that its masks are made from."""
        chosen = self.best_tensors if self.settings.select == "best" else self.average.values
        for tensor, value in zip(self.tensors, chosen, strict=bool(chosen)):
            tensor.copy_(value)
        for joined in self.joined:
            joined.part()
        for mask in self.masks:
            mask.kept_energy = None  # a graph hangs on it, which nobody needs

    def state(self) -> dict[str, Any]:
        best = {"score": self.best_score, "tensors": self.best_tensors}
        return {"average": self.average.values, "best": best, "curve": self.curve.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.average.values = state["average"]
        self.best_score, self.best_tensors = state["best"]["score"], state["best"]["tensors"]
        self.curve.load_state(state["curve"])


def freeze_statistics(model: nn.Module) -> None:
    """Put layers with running statistics (batch norm) into evaluation mode."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


class _Curve:
    """Points of the training curve, kept on the device until they are asked for."""

    def __init__(self, weights: Mapping[str, MaskedParameter], prior: Mapping[str, Tensor] | None) -> None:
        self.masks = {name: weight.learnable for name, weight in weights.items()}
        self.last = {name: mask.gate.index(mask.logits.detach()) for name, mask in self.masks.items()}
        if prior is None:
            self.prior = dict(self.last)
        else:
            self.prior = {
                name: mask.pattern.to_index(prior[name], name).to(mask.logits.device)
                for name, mask in self.masks.items()
            }
        self.groups = sum(mask.logits.shape[1] for mask in self.masks.values())
        self.dense_energy = sum(float(weight.weight.detach().square().sum()) for weight in weights.values())
        self.scalars: list[tuple[float, ...]] = []
        self.measured: list[Tensor] = []

    @torch.no_grad()
    def take(self, scalars: tuple[float, ...], loss: Tensor, norm: Tensor, energy: Tensor) -> None:
        """Add a point; ``scalars`` are step, lr, tau and scaling."""
        top, off, flipped = (torch.zeros_like(loss) for _ in range(3))
        for name, mask in self.masks.items():
            scaled = mask.logits * mask.scaling
            top += mask.gate.max_probability(scaled).sum()
            index = mask.gate.index(scaled)
            off += (index != self.prior[name]).sum()
            flipped += (index != self.last[name]).sum()
            self.last[name] = index
        self.scalars.append(tuple(map(float, scalars)))
        groups, dense_energy = self.groups, self.dense_energy or 1.0
        shares = (loss, top / groups, off / groups, flipped / groups, norm, energy / dense_energy)
        self.measured.append(torch.stack([value.float() for value in shares]))

    def points(self, first: int) -> list[tuple[float, ...]]:
        """The points from the ``first``-th on, in the order of :data:`CURVE_COLUMNS`."""
        measured = torch.stack(self.measured[first:]).tolist() if self.measured[first:] else []
        return [
            (step, loss, lr, tau, scaling, *rest)
            for (step, lr, tau, scaling), (loss, *rest) in zip(self.scalars[first:], measured, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        return {"scalars": self.scalars, "measured": self.measured, "last": self.last}

    def load_state(self, state: dict[str, Any]) -> None:
        self.scalars = [tuple(point) for point in state["scalars"]]
        self.measured, self.last = state["measured"], state["last"]
