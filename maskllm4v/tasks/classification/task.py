"""Image classification with timm models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.checkpoints.third_party import dense_state
from maskllm4v.config import TaskSpec
from maskllm4v.data import ImageData, open_data
from maskllm4v.data.decoded import seeded_globals
from maskllm4v.data.manifest import Manifest
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.tasks.base import ExportableModel, JudgeTraining
from maskllm4v.tasks.classification.accuracy import ClassificationMetrics
from maskllm4v.tasks.classification.models import build_model, image_settings, num_classes
from maskllm4v.tasks.classification.settings import ClassificationSettings, TimmSettings
from maskllm4v.tasks.shared.loading import DataTask
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.progress import bar
from maskllm4v.utils.rng import generator, torch_seed
from maskllm4v.utils.sharding import WHOLE, BatchShard

Batch = tuple[Tensor, Tensor]  # images [B, C, H, W]; labels [B], or their mixture [B, classes]
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Classification(DataTask):
    """Cross-entropy on labels; accuracy, cross-entropy and calibration error on the reported split."""

    judge: JudgeTraining | None = None

    def __init__(self, spec: TaskSpec, data_folder: Path | None = None) -> None:
        super().__init__(spec, data_folder)
        assert isinstance(spec.task, ClassificationSettings)
        assert isinstance(spec.model, TimmSettings)
        self.settings, self.model = spec.task, spec.model

    @cached_property
    def source(self) -> ImageData:
        """Opened when first needed."""
        data, folder = self.opened()
        return open_data(folder, data, self.settings, image_settings(self.model))

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest

    def build_model(self, seed: int, *, pretrained: bool = False) -> nn.Module:
        model = build_model(self.model, seed, pretrained=pretrained)
        model.to(self.device)
        return model

    def read_weights(self, path: Path) -> Mapping[str, Tensor]:
        return dense_state(path)

    def train_mode(self, model: nn.Module) -> None:
        model.train()

    def resized(self, size: int) -> Classification:
        other = Classification(self.spec, self.folder)
        other.source = self.source.resized(size)
        return other

    def generated(self, dense: nn.Module, seed: int) -> Classification:
        raise ConfigError("inputs is 'generated', but a classifier makes no images")

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[Batch]:
        loader = self.step_batches(seed=seed, batch_size=batch_size, steps=steps, start=start, shard=shard)
        keys = ((step, part) for step in range(start, steps) for part in shard.parts)
        for batch, (step, part) in zip(loader, keys, strict=True):
            yield self._mixed(self._on_device(batch), torch_seed(seed, "mix", step, part) % 2**32)

    def calibration(self, batch_size: int, seed: int) -> Sequence[Calibration]:
        return [Calibration(self._plain(*self.calibration_samples(seed), batch_size), self.forward)]

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = model(batch[0])
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        smoothing = 0.0 if batch[1].is_floating_point() else self.settings.label_smoothing  # mixing has smoothed
        return F.cross_entropy(outputs.float(), batch[1], label_smoothing=smoothing)

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float, batch: Batch) -> Tensor:
        """T²·KL(teacher ‖ student) at temperature T (Hinton et al. 2015)."""
        student = F.log_softmax(outputs.float() / temperature, 1)
        target = F.log_softmax(teacher.float() / temperature, 1)
        return temperature**2 * F.kl_div(student, target, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dense: nn.Module | None = None, split: str | None = None) -> dict[str, float]:
        """``top1``, ``top5``, ``ece`` and ``agreement`` in percent, ``nll`` in nats: :class:`ClassificationMetrics`."""
        split = split or self.settings.eval_split
        model.eval()
        tally = ClassificationMetrics(self.device)
        indices = np.arange(len(self.manifest.splits[split]))
        amp = self.settings.eval_amp
        with torch.autocast(self.device.type, AMP.get(amp), enabled=amp != "no"):
            for batch in bar(self._plain(split, indices, self.settings.eval_batch_size), "evaluating"):
                reference = None if dense is None else self.forward(dense, batch)
                tally.add(self.forward(model, batch), batch[1], reference)
        return tally.metrics()

    def score(self, model: nn.Module, split: str) -> float:
        """Top-1."""
        return self.evaluate(model, split=split)["top1"]

    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        return {}

    def summary(self, model: nn.Module, metrics: dict[str, float], extra_parameters: int) -> dict[str, Any]:
        """The original's JSON object; its ``param_count`` counts the logits of a learned mask too."""
        settings = self.model
        transform = image_settings(settings)
        count = sum(parameter.numel() for parameter in model.parameters()) + extra_parameters
        return {
            "model": settings.name,
            "top1": round(metrics["top1"], 4),
            "top1_err": round(100 - metrics["top1"], 4),
            "top5": round(metrics["top5"], 4),
            "top5_err": round(100 - metrics["top5"], 4),
            "param_count": round(count / 1e6, 2),
            "img_size": transform["input_size"][-1],
            "crop_pct": transform["crop_pct"],
            "interpolation": transform["interpolation"],
        }

    def exportable(self, model: nn.Module, batch_size: int) -> ExportableModel:
        """``images`` ``[B, C, H, W]``, normalised as the model's data are, to ``logits`` ``[B, classes]``."""
        shape = (batch_size, *image_settings(self.model)["input_size"])
        images = generator(0, "deployable").standard_normal(shape).astype(np.float32)
        return ExportableModel(model, {"images": torch.from_numpy(images)}, ("logits",))

    @cached_property
    def _mix(self) -> Any:
        """timm's mixup and cutmix, or None."""
        s = self.settings
        if not s.mixup and not s.cutmix:
            return None
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=s.mixup,
            cutmix_alpha=s.cutmix,
            prob=s.mix_probability,
            label_smoothing=s.label_smoothing,
            num_classes=num_classes(self.model),
        )

    def _mixed(self, batch: Batch, seed: int) -> Batch:
        if self._mix is None:
            return batch
        if len(batch[0]) % 2:
            raise ConfigError(f"task.mixup and cutmix pair images, but a process gets {len(batch[0])} at a time")
        with seeded_globals(seed):
            images, targets = self._mix(*batch)
        return images, targets

    def _plain(self, split: str, indices: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """This process's images of a split, decoded by the loader's workers."""
        for batch in self.plain_batches(split, indices, batch_size):
            yield self._on_device(batch)

    def _on_device(self, batch: Batch) -> Batch:
        images, labels = batch
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


TASK = Classification
