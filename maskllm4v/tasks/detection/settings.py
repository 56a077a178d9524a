"""The sections of ``params.yaml`` for object detection: ``task`` and ``model``."""

from __future__ import annotations

from typing import Literal

from maskllm4v.config.base import Count, NonNegative, Share
from maskllm4v.config.sections import JointAugmentationSettings, TaskSettings
from maskllm4v.config.tasks import TaskSections
from maskllm4v.tasks.classification.settings import TimmSettings, check_classification


class DetectionSettings(JointAugmentationSettings, TaskSettings):
    """Focal loss of classes, L1 and generalised IoU of boxes; average precision as COCO has it."""

    name: Literal["detection"] = "detection"
    alpha: Share = 0.5  # of the focal loss: the weight of what is there, 1 - alpha of what is not
    gamma: NonNegative = 2.0  # of the focal loss: how much what is easy counts less
    l1: NonNegative = 2.0  # weight of the boxes' L1 distance, in shares of the image
    giou: NonNegative = 1.0  # weight of 1 - generalised IoU
    detections: Count = 20  # per image, the surest ones
    sure: Share = 0.5  # from this score on, a detection counts for agreement and is drawn
    pictured: Count = 8  # images whose predictions are shown


class DetectorSettings(TimmSettings):
    """A timm model's tokens, and one linear layer that gives each token's classes and box."""

    classes: Count  # of objects
    stride: Count  # pixels a side that a token stands for


SECTIONS = TaskSections(DetectionSettings, DetectorSettings, check=check_classification)
