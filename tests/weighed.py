"""Two tasks without images whose batches weigh differently: points with or without a class, and rows of objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.checkpoints.third_party import dense_state
from maskllm4v.utils.sharding import WHOLE, BatchShard

IGNORED, NONE = -1, -1
WIDTH, CLASSES, PLACES = 16, 4, 6
STEPS = 3
Batch = tuple[Tensor, Tensor]  # features [B, PLACES, WIDTH], classes [B, PLACES]
Outputs = dict[str, Tensor]


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 2 * CLASSES)).double().eval()


class Weighed:
    """Eight samples a step; which classes they have is drawn anew for each step and differs much between its parts.

    In the second step nothing has a class.
    """

    data_digest = ""

    def batch(self, step: int, size: int) -> Batch:
        draw = torch.Generator().manual_seed(step)
        features = torch.randn(size, PLACES, WIDTH, generator=draw, dtype=torch.float64)
        classes = torch.randint(CLASSES, (size, PLACES), generator=draw)
        many = torch.tensor([6, 6, 5, 1, 0, 0, 1, 0])[:, None] if step != 1 else 0
        return features, classes.masked_fill(torch.arange(PLACES).expand(size, -1) >= many, NONE)

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[Batch]:
        for step in range(start, steps):
            parts = [tensor.chunk(shard.count) for tensor in self.batch(step, batch_size)]
            for part in shard.parts:
                features, classes = (tensor[part] for tensor in parts)
                yield features, classes

    def steps_per_epoch(self, batch_size: int) -> int:
        return STEPS

    def read_weights(self, path: Path) -> Any:
        return dense_state(path)

    def weight(self, batch: Batch) -> Tensor:
        return (batch[1] != NONE).sum()

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        logits, boxes = model(batch[0]).chunk(2, -1)
        return {"logits": logits, "boxes": boxes}


class Points(Weighed):
    """Cross-entropy of the points that have a class."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, classes = outputs["logits"].flatten(0, 1), batch[1].flatten()
        return F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")

    def distillation_loss(self, outputs: Outputs, teacher: Outputs, temperature: float, batch: Batch) -> Tensor:
        student, target = ((found["logits"] / temperature).log_softmax(-1) for found in (outputs, teacher))
        divergence = (target.exp() * (target - student)).sum(-1)
        return divergence[batch[1] != IGNORED].sum() * temperature**2


class Objects(Weighed):
    """All places say whether there is an object of a class, those of objects where it is: samples without any count."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        there = batch[1] != NONE
        wanted = F.one_hot(batch[1].clamp(min=0), CLASSES) * there[..., None]
        found = F.binary_cross_entropy_with_logits(outputs["logits"], wanted.double(), reduction="sum")
        return found + (outputs["boxes"][there] - batch[0][there][:, :CLASSES]).abs().sum()

    def distillation_loss(self, outputs: Outputs, teacher: Outputs, temperature: float, batch: Batch) -> Tensor:
        return sum((outputs[key] - teacher[key]).square().sum() for key in outputs)  # type: ignore[return-value]


TASKS: dict[str, type[Points | Objects]] = {"points": Points, "objects": Objects}
