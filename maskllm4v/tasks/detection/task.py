"""Object detection: classes and boxes."""

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
from maskllm4v.data.annotated import NONE, AnnotatedBatch
from maskllm4v.data.manifest import Manifest
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.tasks.base import ExportableModel, JudgeTraining
from maskllm4v.tasks.detection.families import family_of
from maskllm4v.tasks.detection.folders import input_settings
from maskllm4v.tasks.detection.model import Detections, generalised_iou
from maskllm4v.tasks.detection.pictures import drawings
from maskllm4v.tasks.detection.precision import average_precision
from maskllm4v.tasks.detection.settings import DetectionSettings, DetectorSettings
from maskllm4v.tasks.shared.loading import DataTask
from maskllm4v.utils.distributed import rows_of_all, sum_
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.progress import bar
from maskllm4v.utils.rng import generator
from maskllm4v.utils.sharding import WHOLE, BatchShard

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALL = ("*",)  # layers
SAME = 0.5  # IoU from which on two detections are of one object


class Detection(DataTask):
    """A token owns the object whose centre lies in it; average precision on the reported split."""

    judge: JudgeTraining | None = None

    def __init__(self, spec: TaskSpec, data_folder: Path | None = None) -> None:
        super().__init__(spec, data_folder)
        assert isinstance(spec.task, DetectionSettings)
        assert isinstance(spec.model, DetectorSettings)
        self.settings, self.model = spec.task, spec.model
        self.family = family_of(spec.task, spec.model)

    @cached_property
    def source(self) -> AnnotatedData:
        """Opened when first needed.

        Raises:
            ConfigError: the objects have other classes than the model.
        """
        data, folder = self.opened()
        found = open_annotated(folder, data, self.settings, input_settings(self.model), needs="boxes")
        self.family.name_classes(found.manifest.classes, data.name)
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
        self.family.learning_mode(model)

    def resized(self, size: int) -> Detection:
        raise ConfigError("dense.progressive is not for detection, whose models have one size")

    def generated(self, dense: nn.Module, seed: int) -> Detection:
        raise ConfigError("inputs is 'generated', but a detector makes no images")

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[AnnotatedBatch]:
        for batch in self.step_batches(seed=seed, batch_size=batch_size, steps=steps, start=start, shard=shard):
            yield batch.to(self.device)

    def calibration(self, batch_size: int, seed: int) -> Sequence[Calibration]:
        """In two parts where the decoder's queries are not the same ones in the dense and in the pruned model."""
        split, indices = self.calibration_samples(seed)
        paired = self.family.paired_layers
        parts = [(paired, True)] if paired == ALL else [(paired, True), (ALL, False)]
        # On the CPU until they are used: calibration holds all of them.
        return [
            Calibration(
                self.plain_batches(split, indices, batch_size),
                lambda model, batch: self.forward(model, batch.to(self.device)),
                layers=layers,
                tokens=self.family.tokens,
                paired=same,
            )
            for layers, same in parts
        ]

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Any:
        return self.family.forward(model, batch)

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        return self.family.weight(batch)

    def loss(self, outputs: Any, batch: AnnotatedBatch) -> Tensor:
        return self.family.loss(outputs, batch)

    def distillation_loss(self, outputs: Any, teacher: Any, temperature: float, batch: AnnotatedBatch) -> Tensor:
        return self.family.distillation_loss(outputs, teacher, temperature, batch)

    @torch.no_grad()
    def detect(self, model: nn.Module, batch: AnnotatedBatch) -> Detections:
        """What a model finds in a batch."""
        return self.family.detections(self.forward(model, batch), batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dense: nn.Module | None = None, split: str | None = None) -> dict[str, float]:
        """What :func:`~maskllm4v.tasks.detection.precision.average_precision` gives.

        ``agreement``: of what the dense model is sure of, the share that the model is sure of, too. ``kept_queries``,
        of models that select their queries: of the dense model's, the share that the model selects, too; nothing can
        be learned from the others.
        """
        split = split or self.settings.eval_split
        model.eval()
        found = []
        shared, kept = (torch.zeros(2, dtype=torch.int64, device=self.device) for _ in range(2))
        amp = self.settings.eval_amp
        with torch.autocast(self.device.type, AMP.get(amp), enabled=amp != "no"):
            for batch in bar(self._split(split), "evaluating"):
                outputs = self.forward(model, batch)
                seen = self.family.detections(outputs, batch)
                found.append(seen._replace(boxes=batch.at_full_size(seen.boxes)))
                if dense is not None:
                    reference = self.forward(dense, batch)
                    shared += self._shared(self.family.detections(reference, batch), seen)
                    kept += self.family.kept(outputs, reference)
        metrics = self._precision(found, split)
        if dense is None:
            return metrics
        sum_(shared, kept)
        both, sure = shared.tolist()
        metrics["agreement"] = 100 * both / max(sure, 1)
        return (
            metrics if self.family.paired_layers == ALL else metrics | {"kept_queries": 100 * float(kept[0] / kept[1])}
        )

    def score(self, model: nn.Module, split: str) -> float:
        """Average precision."""
        return self.evaluate(model, split=split)["map"]

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        """``predictions``: images of the reported split, their boxes, and what the model finds."""
        model.eval()
        chosen = np.arange(min(self.settings.pictured, self.source.count(self.settings.eval_split)))
        batch = self.source.batch(self.settings.eval_split, chosen, None).to(self.device)
        found = self.detect(model, batch)
        classes = torch.where(found.scores >= self.settings.sure, found.classes, NONE)
        images = self.source.pixels(batch.images).cpu().numpy()
        true, seen = (
            (b.cpu().numpy(), c.cpu().numpy()) for b, c in ((batch.boxes, batch.classes), (found.boxes, classes))
        )
        return {"predictions": drawings(images, true, seen, self.manifest.classes)}

    def summary(self, model: nn.Module, metrics: dict[str, float], extra_parameters: int) -> dict[str, Any]:
        return {}

    def exportable(self, model: nn.Module, batch_size: int) -> ExportableModel:
        """``images`` ``[B, C, H, W]``, normalised as the model's data are, to the family's outputs."""
        shape = (batch_size, *input_settings(self.model)["input_size"])
        images = generator(0, "deployable").standard_normal(shape).astype(np.float32)
        return ExportableModel(self.family.exportable(model), {"images": torch.from_numpy(images)}, self.family.outputs)

    def _split(self, split: str) -> Iterator[AnnotatedBatch]:
        indices = np.arange(self.source.count(split))
        for batch in self.plain_batches(split, indices, self.settings.eval_batch_size):
            yield batch.to(self.device)

    def _shared(self, dense: Detections, found: Detections) -> Tensor:
        """How many of the dense model's sure detections the model is sure of, and how many there are."""
        pairs = generalised_iou(dense.boxes[:, :, None], found.boxes[:, None])  # at least SAME only if the IoU is
        alike = (pairs >= SAME) & (dense.classes[:, :, None] == found.classes[:, None])
        sure, also = dense.scores >= self.settings.sure, found.scores >= self.settings.sure
        return torch.stack([((alike & also[:, None]).any(2) & sure).sum(), sure.sum()])

    def _precision(self, found: Sequence[Detections], split: str) -> dict[str, float]:
        """Of all processes' detections in the order of images, since ties make precision depend on it."""
        count = self.source.count(split)
        detections = [rows_of_all(torch.cat(part), count).cpu().numpy() for part in zip(*found, strict=True)]
        images = list(zip(*detections, strict=True))
        return average_precision(
            list(self.source.annotations(split)), images, self.manifest.classes, self.settings.sizes
        )


TASK = Detection
