"""The first step of a run looks whether all masks are used, so that no mask is trained in vain."""

from __future__ import annotations

import torch
from torch import nn

from maskllm4v.sparsity.usage import Usage, no_effect, not_learned
from maskllm4v.utils.distributed import sum_
from maskllm4v.utils.errors import TrainingError


class FirstStep:
    """Raises :class:`TrainingError` where a mask has no effect; does nothing from the second step on.

    Args:
        row: name in messages.
        model: what is trained; it may have no masks.
        device: of what is trained.
        compiled: whether the model runs inside something compiled.
    """

    def __init__(self, row: str, model: nn.Module, device: torch.device, *, compiled: bool) -> None:
        self._row, self._device = row, device
        self._usage: Usage | None = Usage(model, compiled=compiled)

    def close(self) -> None:
        if self._usage is not None:
            self._usage.close()
        self._usage = None

    def after_forward(self) -> None:
        """Before the last backward pass of the step, in which processes wait for one another's gradients.

        What one process did not read is an error in all of them.
        """
        if self._usage is None or not self._usage.masks:
            return
        own = set(self._usage.unread())
        unread = torch.tensor([name in own for name in self._usage.masks], dtype=torch.int32, device=self._device)
        sum_(unread)
        if names := [name for name, count in zip(self._usage.masks, unread.tolist(), strict=True) if count]:
            raise TrainingError(f"{self._row}: {no_effect(names)}")

    def after_backward(self) -> None:
        """Before the optimiser's step."""
        if self._usage is not None and (names := self._usage.without_gradient()):
            raise TrainingError(f"{self._row}: {not_learned(names)}")
        self.close()
