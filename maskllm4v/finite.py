"""Noticing the first loss that is not finite, without waiting for the device in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from maskllm4v.errors import TrainingError


class FiniteLoss:
    """Remembers, on the device, the first step whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, device=device)

    def watch(self, step: int, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, step, self._first_bad)

    def check(self, row: str, seed: int) -> None:
        """Wait for the device; raise :class:`TrainingError`, naming row, seed and step, if there was one."""
        step = int(self._first_bad)
        if step >= 0:
            raise TrainingError(f"{row}, seed {seed}: the loss is not finite at step {step}")
