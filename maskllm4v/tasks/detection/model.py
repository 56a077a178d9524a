"""A detector of a plain kind: the token that an object's centre lies in gives its class and its box.

No anchors, no matching, no suppression of doubles: a token has one object at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.data.annotated import NONE, AnnotatedBatch
from maskllm4v.tasks.detection.settings import DetectorSettings
from maskllm4v.tasks.shared.tokens import TokenModel, build_backbone
from maskllm4v.utils.rng import torch_seed

BOX = 4  # values of a box


class Detector(TokenModel):
    """Raw values ``[B, classes + 4, h, w]`` of images ``[B, C, H, W]``; :func:`decode` says what they mean."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone, classes + BOX)
        self.classes = classes


def build_detector(settings: DetectorSettings, seed: int, *, pretrained: bool = False) -> Detector:
    """In evaluation mode; the head's weights are drawn from the seed, too."""
    backbone = build_backbone(settings, seed, pretrained=pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "head"))
        model = Detector(backbone, settings.classes)
    model.eval()
    return model


def decode(raw: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens say: logits ``[B, h, w, classes]`` and boxes ``[B, h, w, 4]``.

    A box is its centre and its sides, all in shares of the image. The centre lies within its token or half a token
    beside it, so that a box on a border is not at the end of a sigmoid.
    """
    logits, box = raw.permute(0, 2, 3, 1).split([raw.shape[1] - BOX, BOX], -1)
    height, width = raw.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    corner, size = torch.stack([x, y], -1).to(raw), raw.new_tensor([width, height])
    box = box.sigmoid()
    centre = (corner + 2 * box[..., :2] - 0.5) / size
    return logits, torch.cat([centre, box[..., 2:]], -1)


@dataclass(frozen=True)
class Owners:
    """Which token owns which object.

    Attributes:
        classes: int64 ``[B, h, w]``; :data:`NONE` where a token owns none.
        boxes: float32 ``[B, h, w, 4]``, centre and sides in shares of the image.
    """

    classes: Tensor
    boxes: Tensor


def owners(batch: AnnotatedBatch, grid: tuple[int, int]) -> Owners:
    """The token of each object; where two centres share one, the last object's."""
    height, width = batch.images.shape[2:]
    shares = centred(batch.boxes) / batch.boxes.new_tensor([width, height, width, height])
    there = batch.classes != NONE
    image, place = there.nonzero(as_tuple=True)
    x = (shares[image, place, 0] * grid[1]).long().clamp_(max=grid[1] - 1)
    y = (shares[image, place, 1] * grid[0]).long().clamp_(max=grid[0] - 1)
    classes = torch.full((len(there), *grid), NONE, device=there.device)
    boxes = shares.new_zeros(len(there), *grid, BOX)
    classes[image, y, x], boxes[image, y, x] = batch.classes[there], shares[there]
    return Owners(classes, boxes)


class Detections(NamedTuple):
    """The surest detections of images: boxes ``[B, K, 4]`` by corners in pixels, classes and scores ``[B, K]``."""

    boxes: Tensor
    classes: Tensor
    scores: Tensor


def centred(boxes: Tensor) -> Tensor:
    """Corners ``[..., 4]`` to centre and sides."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def cornered(boxes: Tensor) -> Tensor:
    """Centre and sides ``[..., 4]`` to corners."""
    centre, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - sides / 2, centre + sides / 2], -1)


def generalised_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Of pairs of boxes by corners ``[..., 4]``, in [-1, 1] (Rezatofighi et al. 2019, Eq. 1)."""
    inner = _area(torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:]))
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - inner
    hull = _area(torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:]))
    small = torch.finfo(boxes.dtype).tiny
    return inner / union.clamp(min=small) - (hull - union) / hull.clamp(min=small)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)


def focal_loss(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Of each value, for targets in [0, 1] (Lin et al. 2017, Eq. 5; soft targets as in Li et al. 2020, Eq. 2)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = (logits.sigmoid() - target).abs().pow(gamma) * (alpha * target + (1 - alpha) * (1 - target))
    return weight * entropy
