"""Mask learning as the paper prints it, in PyTorch's own words: ``F.gumbel_softmax``, a product, ``w * mask``.

Logits are held ``[groups, K]`` and the softmax runs over the last axis, as one writes it from MaskLLM
(arXiv 2409.17481, Eq. 5-7) without thinking of memory; autograd finds the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.surgery import replace_
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.tasks.base import Objective
from maskllm4v.training.trainer import TrainTarget


def masked_weight(
    weight: Tensor, logits: Tensor, candidates: Tensor, *, tau: float, scaling: float, hard: bool = False
) -> tuple[Tensor, Tensor]:
    """The masked weight ``[out, in]`` and the sum of its squares, noise drawn from torch's generator.

    Args:
        weight: ``[out, in]``.
        logits: ``[groups, K]``.
        candidates: ``[K, M]``.
        tau, scaling, hard: as in :func:`maskllm4v.sparsity.gumbel.masked_weight`.
    """
    soft = F.gumbel_softmax(scaling * logits, tau=tau, hard=hard, dim=-1)
    masked = weight * (soft @ candidates).view_as(weight)
    return masked, masked.square().sum()


class TextbookLinear(nn.Linear):
    """A frozen linear layer under a learned N:M mask."""

    candidates: Tensor

    def __init__(self, linear: nn.Linear, pattern: NMPattern, *, hard: bool = False, gate_std: float = 0.2) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.hard, self.tau, self.scaling = hard, 1.0, 100.0
        groups = linear.weight.numel() // pattern.m
        self.logits = nn.Parameter(gate_std * torch.randn(groups, pattern.num_candidates, device=linear.weight.device))
        self.register_buffer("candidates", pattern.candidates(linear.weight.device, linear.weight.dtype))
        self.kept_energy: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight, self.kept_energy = masked_weight(
            self.weight, self.logits, self.candidates, tau=self.tau, scaling=self.scaling, hard=self.hard
        )
        return F.linear(input, weight, self.bias)


class Textbook(TrainTarget):
    """Trains the logits of a model's layers, all put in its place here; the default AdamW.

    Args:
        model: dense; changed in place.
        pattern: e.g. ``"2:4"``.
        exclude: layers that stay dense.
        hard: straight-through masks.
        lr, weight_decay: of AdamW.
        regularisation: λ of −λ·Σ(masked weight)².
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str,
        *,
        exclude: list[str],
        hard: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        regularisation: float = 1e-5,
    ) -> None:
        model.requires_grad_(False)
        replace_(
            model,
            prunable_linears(model, NMPattern(pattern), exclude=exclude),
            lambda _, linear: TextbookLinear(linear, NMPattern(pattern), hard=hard),
        )
        self.row, self.model, self.regularisation = "textbook", model, regularisation
        self.layers = [layer for layer in model.modules() if isinstance(layer, TextbookLinear)]
        self.tensors = [layer.logits for layer in self.layers]
        self.optimizer = torch.optim.AdamW(self.tensors, lr=lr, weight_decay=weight_decay)

    def train_mode(self) -> None:
        self.model.train()

    def loss(self, model: nn.Module, task: Objective, batch: Any) -> tuple[Tensor, Tensor]:
        loss = task.loss(task.forward(model, batch), batch)
        energy = sum(layer.kept_energy for layer in self.layers if layer.kept_energy is not None)
        return loss - self.regularisation * energy, loss
