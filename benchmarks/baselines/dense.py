"""Dense fine-tuning: every weight trained by fused AdamW. What a training step costs without any mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.tasks.base import Objective
from maskllm4v.training.trainer import TrainTarget


class Dense(TrainTarget):
    """Trains all parameters of a model.

    Args:
        model: changed in place.
        lr, weight_decay: of AdamW.
    """

    def __init__(self, model: nn.Module, *, lr: float = 1e-4, weight_decay: float = 0.01) -> None:
        self.row, self.model = "dense", model
        self.tensors = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.tensors, lr=lr, weight_decay=weight_decay, fused=True)

    def train_mode(self) -> None:
        self.model.train()

    def loss(self, model: nn.Module, task: Objective, batch: Any) -> tuple[Tensor, Tensor]:
        loss = task.loss(task.forward(model, batch), batch)
        return loss, loss
