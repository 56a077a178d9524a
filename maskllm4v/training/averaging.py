"""Exponential moving averages of what is trained: of logits alone while masks are learned, never of masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """The average of some tensors over the steps of a run.

    Args:
        tensors: what is averaged.
        decay: per step; 0 switches averaging off.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors, self.decay = tensors, decay
        self.values = [tensor.detach().clone() for tensor in tensors] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors as they are after a step."""
        if self.decay:
            torch._foreach_lerp_(self.values, [tensor.detach() for tensor in self.tensors], 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the tensors with their averages; a second time exchanges them back."""
        for tensor, value in zip(self.tensors, self.values, strict=bool(self.decay)):
            kept = tensor.detach().clone()
            tensor.copy_(value)
            value.copy_(kept)
