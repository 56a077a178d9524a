"""Image classification with timm models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.config import Experiment
from maskllm4v.data import ImageData, open_data
from maskllm4v.data.batches import StepBatches, step_loader
from maskllm4v.devices import pick_device
from maskllm4v.models import build_model, image_settings
from maskllm4v.progress import bar

Batch = tuple[Tensor, Tensor]  # images [B, C, H, W], labels [B]


class Classification:
    """Cross-entropy on labels; top-1 and top-5 accuracy and cross-entropy on the test split."""

    def __init__(self, experiment: Experiment, data_folder: Path) -> None:
        self.experiment = experiment
        self.settings = experiment.task
        self.device = pick_device(experiment.runtime.device)
        self._folder = data_folder
        self._data: ImageData | None = None

    @property
    def data(self) -> ImageData:
        """Opened when first needed."""
        if self._data is None:
            options: dict[str, Any] = {}
            if self.experiment.data.source == "digits":
                options = {"shift": self.settings.shift, "shift_probability": self.settings.shift_probability}
            else:
                options = {"transform": image_settings(self.experiment.model)}
            self._data = open_data(self._folder, **options)
        return self._data

    @property
    def data_digest(self) -> str:
        return self.data.manifest.digest

    def build_model(self, seed: int) -> nn.Module:
        return build_model(self.experiment.model, seed, pretrained=False).to(self.device)

    def train_batches(self, *, seed: int, batch_size: int, steps: int, start: int = 0) -> Iterator[Batch]:
        workers = self.experiment.runtime.loader_workers
        for batch in step_loader(
            self.data, seed=seed, batch_size=batch_size, steps=steps, start=start, workers=workers
        ):
            yield self._on_device(batch)

    def steps_per_epoch(self, batch_size: int) -> int:
        return StepBatches(self.data, seed=0, batch_size=batch_size).steps_per_epoch

    def calibration_batches(self, batch_size: int) -> Iterator[Batch]:
        return self._plain("train", self.data.manifest.calibration, batch_size)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = model(batch[0])
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.float(), batch[1], label_smoothing=self.settings.label_smoothing)

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """T²·KL(teacher ‖ student) at temperature T (Hinton et al. 2015)."""
        student = F.log_softmax(outputs.float() / temperature, 1)
        target = F.log_softmax(teacher.float() / temperature, 1)
        return temperature**2 * F.kl_div(student, target, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``top1`` and ``top5`` in percent, ``nll`` in nats, over every test image once."""
        model.eval()
        count, hits1, hits5, nll = 0, 0, 0, 0.0
        indices = np.arange(len(self.data.manifest.splits["test"]))
        for batch in bar(self._plain("test", indices, self.settings.eval_batch_size), "evaluating"):
            logits, labels = self.forward(model, batch).float(), batch[1]
            ranked = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
            hits1 += int(ranked[:, 0].sum())
            hits5 += int(ranked.any(1).sum())
            nll += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        return {"top1": 100 * hits1 / count, "top5": 100 * hits5 / count, "nll": nll / count}

    def _plain(self, split: str, indices: np.ndarray, batch_size: int) -> Iterator[Batch]:
        labels = self.data.labels(split)
        for first in range(0, len(indices), batch_size):
            chosen = indices[first : first + batch_size]
            yield self._on_device((self.data.images(split, chosen, None), labels[chosen]))

    def _on_device(self, batch: Batch) -> Batch:
        images, labels = batch
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
