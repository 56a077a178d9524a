"""Losses of a step that do not depend on how its batch is divided.

Where parts of a batch weigh differently (valid pixels, objects), a mean of their means is another number than the mean
over the batch. So such a task sums, and what it sums is divided by the weight of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.tasks.base import Objective, weight_of
from maskllm4v.utils.distributed import sum_
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.processes import world_size


def weighed(task: Objective, batches: Iterable[Any], device: torch.device) -> tuple[Objective, Iterable[Any]]:
    """What is minimised in one step: means over its micro-batches whose mean over all parts is the step's loss.

    A task without weights, and its batches, are given back as they are. For one with weights all micro-batches of the
    step are fetched and held first, and processes add up their weights: all of them have to call this, once a step.

    Args:
        task: gives losses, and weights if it has any.
        batches: this process's micro-batches of the step.
        device: of what is trained.

    Raises:
        ConfigError: the task gives some of the micro-batches a weight, and others none.
    """
    if not hasattr(task, "weight"):
        return task, batches
    held = list(batches)
    weights = [weight for batch in held if (weight := weight_of(task, batch)) is not None]
    if not weights:
        return task, held
    if len(weights) < len(held):
        raise ConfigError(f"the task's weight is None for {len(held) - len(weights)} of a step's {len(held)} batches")
    total = torch.stack(weights).sum().to(device)
    sum_(total)
    return _Weighed(task, len(held) * world_size(), total.clamp(min=1)), held


class _Weighed:
    """A task whose losses are sums, made into the means that a loop averages over ``parts`` of a step."""

    def __init__(self, task: Objective, parts: int, total: Tensor) -> None:
        self._task, self._parts, self._total = task, parts, total

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return self._task.forward(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return self._mean(self._task.loss(outputs, batch))

    def distillation_loss(self, outputs: Any, teacher: Any, temperature: float, batch: Any) -> Tensor:
        return self._mean(self._task.distillation_loss(outputs, teacher, temperature, batch))

    def _mean(self, loss: Tensor) -> Tensor:
        return loss * self._parts / self._total.to(loss)
