"""Noticing the first loss or gradient that is not finite, without waiting for the device in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from maskllm4v.utils.errors import TrainingError

_NAMES = ("loss", "gradient")


class NonFiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((len(_NAMES),), -1, device=device)

    def watch(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        bad = ~torch.isfinite(torch.stack([loss.detach().float(), grad_norm.detach().float()]))
        self._first_bad = torch.where(bad & (self._first_bad < 0), step, self._first_bad)

    def check(self, row: str, seed: int) -> None:
        """Wait for the device; raise :class:`TrainingError`, naming row, seed and step, if there was one."""
        found = [(step, name) for step, name in zip(self._first_bad.tolist(), _NAMES, strict=True) if step >= 0]
        if found:
            step, name = min(found, key=lambda one: one[0])  # the loss, if both in the same step
            raise TrainingError(f"{row}, seed {seed}: the {name} is not finite at step {step}")
