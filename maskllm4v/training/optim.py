"""The optimiser of a training, and its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from maskllm4v.config import TrainingSettings
from maskllm4v.training.schedule import cosine, warm_up
from maskllm4v.utils.errors import ConfigError


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


class LearningRate:
    """Linear warm-up times half a cosine, for all parameter groups of an optimiser.

    Args:
        optimizer: new, so that its groups have the rates that they were made with; ratios between groups stay.
        settings: ``lr``, ``min_lr`` and ``warmup``.
        steps: of the whole run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps: int) -> None:
        self._optimizer, self._settings, self._steps = optimizer, settings, steps
        self._initial = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int, done: float) -> float:
        """Set the rate of a step, ``done`` of the annealing being over (0 to 1); returns it."""
        settings = self._settings
        factor = warm_up(step, round(settings.warmup * self._steps))
        lr = cosine(settings.lr, settings.min_lr, done) * factor
        for group, first in zip(self._optimizer.param_groups, self._initial, strict=True):
            group["lr"] = lr if first == settings.lr else first * (lr / settings.lr)
        return lr
