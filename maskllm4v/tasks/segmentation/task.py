"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.third_party import dense_state
from maskllm4v.config import TaskSpec
from maskllm4v.data import AnnotatedData, open_annotated
from maskllm4v.data.annotated import AnnotatedBatch
from maskllm4v.data.manifest import Manifest
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.tasks.base import ExportableModel, JudgeTraining
from maskllm4v.tasks.segmentation.families import family_of
from maskllm4v.tasks.segmentation.folders import check_names, input_settings
from maskllm4v.tasks.segmentation.full_size import logits_at, places
from maskllm4v.tasks.segmentation.pictures import overlays
from maskllm4v.tasks.segmentation.scores import SegmentationScores
from maskllm4v.tasks.segmentation.settings import SegmentationSettings, SegmenterSettings
from maskllm4v.tasks.shared.loading import DataTask
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.progress import bar
from maskllm4v.utils.rng import generator
from maskllm4v.utils.sharding import WHOLE, BatchShard

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Segmentation(DataTask):
    """Cross-entropy for each pixel that has a class; mean intersection over union on the reported split."""

    judge: JudgeTraining | None = None

    def __init__(self, spec: TaskSpec, data_folder: Path | None = None) -> None:
        super().__init__(spec, data_folder)
        assert isinstance(spec.task, SegmentationSettings)
        assert isinstance(spec.model, SegmenterSettings)
        self.settings, self.model = spec.task, spec.model
        self.family = family_of(spec.model)

    @cached_property
    def source(self) -> AnnotatedData:
        """Opened when first needed.

        Raises:
            ConfigError: the masks have another number of classes than the model.
        """
        data, folder = self.opened()
        found = open_annotated(folder, data, self.settings, input_settings(self.model), needs="masks")
        if (count := len(found.mask_classes)) != self.model.classes:
            raise ConfigError(
                f"model.classes is {self.model.classes}, but the masks of {data.name} have {count} classes"
            )
        check_names(self.model, data.name, found.mask_classes)
        return found

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest

    def build_model(self, seed: int, *, pretrained: bool = False) -> nn.Module:
        return self.family.build(self.model, seed, pretrained=pretrained).to(self.device)

    def read_weights(self, path: Path) -> Mapping[str, Tensor]:
        return dense_state(path)

    def train_mode(self, model: nn.Module) -> None:
        model.train()

    def learning_mode(self, model: nn.Module) -> None:
        """Models of transformers are in evaluation mode while masks are learned.

        In training mode they drop activations, normalise by the batch's statistics, or hide tokens from queries (EoMT).
        """
        model.train(not self.model.of_transformers)

    def resized(self, size: int) -> Segmentation:
        raise ConfigError("dense.progressive is not for segmentation, whose models have one size")

    def generated(self, dense: nn.Module, seed: int) -> Segmentation:
        raise ConfigError("inputs is 'generated', but a segmenter makes no images")

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[AnnotatedBatch]:
        for batch in self.step_batches(seed=seed, batch_size=batch_size, steps=steps, start=start, shard=shard):
            yield batch.to(self.device)

    def calibration(self, batch_size: int, seed: int) -> Sequence[Calibration]:
        batches = self.plain_batches(*self.calibration_samples(seed), batch_size)
        # On the CPU until they are used: calibration holds all of them.
        return [Calibration(batches, lambda model, batch: self.forward(model, batch.to(self.device)))]

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Any:
        return self.family.forward(model, batch)

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        return self.family.weight(batch)

    def loss(self, outputs: Any, batch: AnnotatedBatch) -> Tensor:
        return self.family.loss(outputs, batch)

    def distillation_loss(self, outputs: Any, teacher: Any, temperature: float, batch: AnnotatedBatch) -> Tensor:
        return self.family.distillation_loss(outputs, teacher, temperature, batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dense: nn.Module | None = None, split: str | None = None) -> dict[str, float]:
        """See :class:`~maskllm4v.tasks.segmentation.scores.SegmentationScores`; pictures count as they are stored."""
        split = split or self.settings.eval_split
        model.eval()
        scores = SegmentationScores(self.source.mask_classes, self.settings.border, self.device)
        amp = self.settings.eval_amp
        with torch.autocast(self.device.type, AMP.get(amp), enabled=amp != "no"):
            for batch in bar(self._split(split), "evaluating"):
                outputs = self.forward(model, batch)
                reference = None if dense is None else self.forward(dense, batch)
                for place in places(batch):
                    height, width = place.size
                    scores.add(
                        logits_at(place, self.family, outputs),
                        batch.truth[place.images, :height, :width],
                        None if dense is None else logits_at(place, self.family, reference),
                    )
        return scores.metrics()

    def score(self, model: nn.Module, split: str) -> float:
        """Mean intersection over union."""
        return self.evaluate(model, split=split)["miou"]

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        """``predictions``: images of the reported split, their masks, and what the model finds."""
        model.eval()
        chosen = np.arange(min(self.settings.pictured, self.source.count(self.settings.eval_split)))
        batch = self.source.batch(self.settings.eval_split, chosen, None).to(self.device)
        found = self._logits(model, batch).argmax(1)
        images = self.source.pixels(batch.images).cpu().numpy()
        return {"predictions": overlays(images, batch.masks.cpu().numpy(), found.cpu().numpy())}

    def summary(self, model: nn.Module, metrics: dict[str, float], extra_parameters: int) -> dict[str, Any]:
        return {}

    def exportable(self, model: nn.Module, batch_size: int) -> ExportableModel:
        """``images`` ``[B, C, H, W]``, normalised as the model's data are, to the family's outputs."""
        shape = (batch_size, *input_settings(self.model)["input_size"])
        images = generator(0, "deployable").standard_normal(shape).astype(np.float32)
        module = self.family.exportable(model)
        return ExportableModel(module, {"images": torch.from_numpy(images)}, self.family.outputs)

    def _logits(self, model: nn.Module, batch: AnnotatedBatch) -> Tensor:
        height, width = batch.masks.shape[1:]
        return self.family.logits(self.forward(model, batch), (height, width))

    def _split(self, split: str) -> Iterator[AnnotatedBatch]:
        indices = np.arange(self.source.count(split))
        for batch in self.plain_batches(split, indices, self.settings.eval_batch_size):
            yield batch.to(self.device)


TASK = Segmentation
