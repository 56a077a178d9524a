"""The mask-learning loop: frozen weights, trained logits (MaskLLM, arXiv 2409.17481).

It knows no images and no labels: a :class:`~maskllm4v.tasks.Task` runs the model and gives the loss.
Nothing in a step waits for the device; curves are kept there and fetched at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskllm4v.config import LearningSettings
from maskllm4v.errors import TrainingError
from maskllm4v.finite import FiniteLoss
from maskllm4v.layers import Draw, LearnableMaskedLinear
from maskllm4v.progress import bar
from maskllm4v.randomness import seeded_steps
from maskllm4v.schedule import cosine, linear, progress
from maskllm4v.surgery import as_dense, current_masks, learnable_layers, set_draw
from maskllm4v.tasks import Task

CURVE_COLUMNS = (
    "step",
    "loss",  # without the regulariser
    "lr",
    "tau",
    "scaling",
    "max_probability",  # of softmax(s·l): the chance of the likeliest candidate, mean over groups
    "off_prior",  # share of groups whose arg-max is not the prior's
    "flipped",  # share of groups whose arg-max changed since the last point
    "grad_norm",  # before clipping
    "kept_energy",  # Σ(soft masked weight)² / Σw²
)


@dataclass(frozen=True)
class Learned:
    """What learning gives: masks by layer name, and a curve of :data:`CURVE_COLUMNS`."""

    masks: dict[str, Tensor]
    curve: list[tuple[float, ...]]


def learn_masks(
    model: nn.Module,
    task: Task,
    settings: LearningSettings,
    *,
    seed: int = 0,
    prior: Mapping[str, Tensor] | None = None,
    row: str = "masks",
    position: int = 0,
    on_point: Callable[[int], None] | None = None,
) -> Learned:
    """Learn the masks of a model whose layers :func:`maskllm4v.make_learnable` has made learnable.

    Args:
        model: left in evaluation mode, its logits trained (their average if ``settings.ema`` is on).
        task: gives batches and loss.
        settings: steps, optimiser, annealing, regularisation, distillation.
        seed: of order, augmentation and Gumbel noise.
        prior: masks to measure ``off_prior`` against; by default the initial arg-max masks.
        row: name in messages and on the progress bar.
        position: line of the progress bar.
        on_point: called with the step whenever a point of the curve has been taken.

    Raises:
        TrainingError: nothing is learnable, or the loss stopped being finite; names row, seed and step.
    """
    layers = learnable_layers(model)
    if not layers:
        raise TrainingError(f"{row}: the model has no learnable mask; call make_learnable first")
    logits = [layer.logits for layer in layers.values()]
    average = [tensor.detach().clone() for tensor in logits] if settings.ema else []
    optimizer = torch.optim.AdamW(
        logits, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    curve, finite = _Curve(layers, prior), FiniteLoss(logits[0].device)
    steps_per_epoch = task.steps_per_epoch(settings.batch_size)
    batches = task.train_batches(seed=seed, batch_size=settings.batch_size, steps=settings.steps)
    _train_mode(model)
    with seeded_steps(logits[0].device, seed) as seed_step:
        for step, batch in enumerate(bar(batches, f"{row}, seed {seed}", total=settings.steps, position=position)):
            seed_step(step)
            share = progress(step, settings.steps, steps_per_epoch, settings.anneal)
            lr = cosine(settings.lr, settings.min_lr, share)
            tau, scaling = linear(*settings.tau, share), linear(*settings.scaling, share)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for layer in layers.values():
                layer.tau, layer.scaling = tau, scaling
            set_draw(model, Draw(seed, step))

            loss, energy = _loss(model, task, batch, settings, layers)
            optimizer.zero_grad(set_to_none=True)
            (loss - settings.regularisation * energy).backward()
            limit = settings.clip_grad or float("inf")
            norm = nn.utils.clip_grad_norm_(logits, limit)
            finite.watch(step, loss, norm)
            optimizer.step()
            if average:
                torch._foreach_lerp_(
                    average, [tensor.detach() for tensor in logits], 1 - _ema_decay(settings.ema, step)
                )
            if step % settings.log_every == 0 or step == settings.steps - 1:
                curve.take(step, loss.detach(), lr, tau, scaling, norm.detach(), energy.detach())
                finite.check(row, seed)
                if on_point is not None:
                    on_point(step)
    with torch.no_grad():
        for tensor, mean in zip(logits, average, strict=bool(average)):
            tensor.copy_(mean)
    model.eval()
    return Learned(current_masks(model), curve.points())


def _loss(
    model: nn.Module,
    task: Task,
    batch: object,
    settings: LearningSettings,
    layers: Mapping[str, LearnableMaskedLinear],
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and Σ(masked weight)² over all layers."""
    outputs = task.forward(model, batch)
    energy = torch.stack([layer.kept_energy for layer in layers.values() if layer.kept_energy is not None]).sum()
    share = settings.distillation
    loss = (1 - share) * task.loss(outputs, batch) if share < 1 else torch.zeros_like(energy)
    if share > 0:
        # The teacher is the very same model with its masks off: no second copy of the weights.
        training = [module for module in model.modules() if module.training]
        model.eval()
        with torch.no_grad(), as_dense(model):
            teacher = task.forward(model, batch)
        for module in training:
            module.training = True
        loss = loss + share * task.distillation_loss(outputs, teacher, settings.distillation_temperature)
    return loss, energy


def _train_mode(model: nn.Module) -> None:
    """Training mode, but for layers with running statistics: those belong to the frozen dense model."""
    model.train()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


def _ema_decay(decay: float, step: int) -> float:
    """A warm-up for short runs: the average follows closely at first (as in TensorFlow's and timm's)."""
    return min(decay, (1 + step) / (10 + step))


class _Curve:
    """Points of the training curve, kept on the device until they are asked for."""

    def __init__(self, layers: Mapping[str, LearnableMaskedLinear], prior: Mapping[str, Tensor] | None) -> None:
        self.layers = layers
        self.last = {name: layer.logits.detach().argmax(0) for name, layer in layers.items()}
        if prior is None:
            self.prior = dict(self.last)
        else:
            self.prior = {
                name: layer.pattern.to_index(prior[name], name).to(layer.logits.device)
                for name, layer in layers.items()
            }
        self.groups = sum(layer.logits.shape[1] for layer in layers.values())
        self.dense_energy = sum(float(layer.weight.detach().square().sum()) for layer in layers.values())
        self.scalars: list[tuple[float, ...]] = []
        self.measured: list[Tensor] = []

    @torch.no_grad()
    def take(
        self, step: int, loss: Tensor, lr: float, tau: float, scaling: float, norm: Tensor, energy: Tensor
    ) -> None:
        top = torch.zeros_like(loss)
        off, flipped = torch.zeros_like(loss), torch.zeros_like(loss)
        for name, layer in self.layers.items():
            scaled = layer.logits * layer.scaling
            # max softmax = 1 / Σ exp(z − max z)
            top += (scaled - scaled.amax(0)).exp().sum(0).reciprocal().sum()
            index = scaled.argmax(0)
            off += (index != self.prior[name]).sum()
            flipped += (index != self.last[name]).sum()
            self.last[name] = index
        self.scalars.append((float(step), lr, tau, scaling))
        groups, dense_energy = self.groups, self.dense_energy or 1.0
        shares = (loss, top / groups, off / groups, flipped / groups, norm, energy / dense_energy)
        self.measured.append(torch.stack([value.float() for value in shares]))

    def points(self) -> list[tuple[float, ...]]:
        """All points, in the order of :data:`CURVE_COLUMNS`."""
        measured = torch.stack(self.measured).tolist() if self.measured else []
        return [
            (step, loss, lr, tau, scaling, *rest)
            for (step, lr, tau, scaling), (loss, *rest) in zip(self.scalars, measured, strict=True)
        ]
