"""A small experiment on digits: its settings, its prepared data, and masks for its model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import MaskCheckpoint
from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.tasks.classification.models import PLAIN_VIT
from maskllm4v.tasks.classification.task import Classification

ARGS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
}


def experiment(*, data: dict[str, Any] | None = None, **task: Any) -> Experiment:
    return parse_experiment(
        {
            "table": "t",
            "title": "T",
            "seeds": [0, 1],
            "data": {"name": "digits", "source": "digits", "calibration": 50, **(data or {})},
            "task": {"eval_batch_size": 100, **task},
            "model": {"name": PLAIN_VIT, "args": ARGS, "fused_attention": False},
            "dense": {"row": "dense", "init": "scratch", "steps": 3},
            "rows": {"dense": "Dense"},
            "runtime": {"device": "cpu"},
        }
    )


def random_masks(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = prunable_linears(model, exclude=["head"])
    return {
        name: (torch.rand(layer.weight.numel() // 4, 4, generator=generator).argsort(1) < 2).reshape(layer.weight.shape)
        for name, layer in layers.items()
    }


def checkpoint(masks: dict[str, Tensor], **changes: Any) -> MaskCheckpoint:
    fields: dict[str, Any] = {"base": "", "method": "wanda", "weights": {}, "prior": {}}
    return MaskCheckpoint(NMPattern("2:4"), masks, **{**fields, **changes})


def metrics_by_hand(model: nn.Module, task: Classification, split: str = "test") -> dict[str, float]:
    """One image's rank and loss at a time, in float64."""
    labels = task.source.labels(split).tolist()
    with torch.no_grad():
        logits = model(task.source.images(split, np.arange(len(labels)), None)).double().numpy()
    ranks = [sum(other > row[label] for other in row) for row, label in zip(logits, labels, strict=True)]
    nll = [np.log(np.exp(row - row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    return {
        "top1": 100 * sum(rank < 1 for rank in ranks) / len(labels),
        "top5": 100 * sum(rank < 5 for rank in ranks) / len(labels),
        "nll": sum(nll) / len(labels),
    }
