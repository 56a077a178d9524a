"""What differs between detectors: what they give, which boxes that means, and what they are trained by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.data.annotated import NONE, AnnotatedBatch
from maskllm4v.tasks.detection.learned import LearnedQueries
from maskllm4v.tasks.detection.model import (
    Detections,
    build_detector,
    cornered,
    decode,
    focal_loss,
    generalised_iou,
    owners,
)
from maskllm4v.tasks.detection.selected import SelectedQueries
from maskllm4v.tasks.detection.settings import LEARNED, DetectionSettings, DetectorSettings
from maskllm4v.utils.errors import ConfigError


class DetectionFamily(Protocol):
    """Models with outputs of one kind. Losses are sums, to be divided by the :meth:`weight` of all that they sum over.

    Attributes:
        outputs: the names of what the model gives, for export.
        paired_layers: name patterns of those whose tokens stand for the same things in a dense and in a pruned model,
            one by one.
    """

    outputs: tuple[str, ...]
    paired_layers: tuple[str, ...]

    def build(self, settings: DetectorSettings, seed: int, *, pretrained: bool) -> nn.Module:
        """The model in evaluation mode, its weights drawn from the seed where none are loaded."""

    def name_classes(self, names: Sequence[str], data: str) -> None:
        """Say what classes the data of that name have.

        Raises:
            ConfigError: the model cannot have them.
        """

    def learning_mode(self, model: nn.Module) -> None:
        """Put a model into the mode that its masks are learned in."""

    def exportable(self, model: nn.Module) -> nn.Module:
        """A module that holds the model and gives nothing but :attr:`outputs` of images ``[B, C, H, W]``."""

    def tokens(self, name: str, shape: torch.Size, batch: AnnotatedBatch) -> Tensor | None:
        """Which tokens count in calibration, see :attr:`maskllm4v.sparsity.calibration.Calibration.tokens`."""

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Any:
        """Run the model on a batch."""

    def detections(self, outputs: Any, batch: AnnotatedBatch) -> Detections:
        """The :attr:`DetectionSettings.detections` surest pairs of a place and a class."""

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        """What the batch's losses have to be divided by, a scalar."""

    def loss(self, outputs: Any, batch: AnnotatedBatch) -> Tensor:
        """Training loss, a scalar sum."""

    def distillation_loss(self, outputs: Any, teacher: Any, temperature: float, batch: AnnotatedBatch) -> Tensor:
        """How far the outputs are from the dense model's, a scalar sum."""

    def kept(self, outputs: Any, dense: Any) -> Tensor:
        """How many of the dense model's queries the model has, too; and how many there are: int64 ``[2]``."""


class TokenFamily:
    """A backbone whose tokens each own the object whose centre lies in them: no anchors, no matching, no suppression.

    Args:
        settings: weights of the losses.
        model: how many classes there are.
    """

    outputs: tuple[str, ...] = ("raw",)
    paired_layers: tuple[str, ...] = ("*",)

    def __init__(self, settings: DetectionSettings, model: DetectorSettings) -> None:
        self.settings, self.model = settings, model

    def build(self, settings: DetectorSettings, seed: int, *, pretrained: bool) -> nn.Module:
        return build_detector(settings, seed, pretrained=pretrained)

    def name_classes(self, names: Sequence[str], data: str) -> None:
        if len(names) != self.model.classes:
            raise ConfigError(f"model.classes is {self.model.classes}, but {data} has objects of {len(names)} classes")

    def learning_mode(self, model: nn.Module) -> None:
        model.train()

    def exportable(self, model: nn.Module) -> nn.Module:
        return model

    def tokens(self, name: str, shape: torch.Size, batch: AnnotatedBatch) -> Tensor | None:
        return None

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Tensor:
        """Raw values ``[B, classes + 4, h, w]``; :func:`~maskllm4v.tasks.detection.model.decode` reads them."""
        raw: Tensor = model(batch.images)
        return raw

    def detections(self, outputs: Tensor, batch: AnnotatedBatch) -> Detections:
        logits, boxes = decode(outputs.float())
        scores = logits.sigmoid().flatten(1)
        scores, places = scores.topk(min(self.settings.detections, scores.shape[1]), 1)
        tokens, classes = places // logits.shape[-1], places % logits.shape[-1]
        chosen = cornered(boxes.flatten(1, 2).gather(1, tokens[..., None].expand(-1, -1, 4)))
        height, width = batch.images.shape[2:]
        return Detections(chosen * chosen.new_tensor([width, height, width, height]), classes, scores)

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        """How many objects there are."""
        return (batch.classes != NONE).sum()

    def loss(self, outputs: Tensor, batch: AnnotatedBatch) -> Tensor:
        """Focal loss of all tokens' classes; L1 and 1 - GIoU of the owners' boxes."""
        settings = self.settings
        logits, boxes = decode(outputs.float())
        wanted = owners(batch, (logits.shape[1], logits.shape[2]))
        there = wanted.classes != NONE
        target = F.one_hot(wanted.classes.clamp(min=0), logits.shape[-1]).to(logits) * there[..., None]
        own, true = boxes[there], wanted.boxes[there]
        focal = focal_loss(logits, target, settings.alpha, settings.gamma).sum()
        misfit = (1 - generalised_iou(cornered(own), cornered(true))).sum()
        return focal + settings.l1 * (own - true).abs().sum() + settings.giou * misfit

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float, batch: AnnotatedBatch) -> Tensor:
        """The same against what the dense model finds, its boxes weighted by how sure it is of them.

        Scores are soft targets, so there is no temperature.
        """
        settings = self.settings
        (logits, boxes), (sure, wanted) = decode(outputs.float()), decode(teacher.float())
        target = sure.sigmoid()
        weight = target.amax(-1)
        focal = focal_loss(logits, target, settings.alpha, settings.gamma).sum()
        apart = (weight[..., None] * (boxes - wanted).abs()).sum()
        misfit = (weight * (1 - generalised_iou(cornered(boxes), cornered(wanted)))).sum()
        return focal + settings.l1 * apart + settings.giou * misfit

    def kept(self, outputs: Tensor, dense: Tensor) -> Tensor:
        return torch.tensor([dense[:, 0].numel()] * 2, device=dense.device)


def family_of(settings: DetectionSettings, model: DetectorSettings) -> DetectionFamily:
    """That of the model which some settings name."""
    if not model.of_transformers:
        return TokenFamily(settings, model)
    return LearnedQueries(settings, model) if model.name in LEARNED else SelectedQueries(settings, model)
