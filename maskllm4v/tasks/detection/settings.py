"""The sections of ``params.yaml`` for object detection: ``task`` and ``model``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from maskllm4v.config.base import Count, FirstLast, NonNegative, Share
from maskllm4v.config.metrics import Metric, TaskMetrics
from maskllm4v.config.sections import TaskSettings
from maskllm4v.config.tasks import TaskSections
from maskllm4v.tasks.classification.settings import TimmSettings, check_classification


class DetectionSettings(TaskSettings):
    """Focal loss of classes, L1 and generalised IoU of boxes; average precision as COCO has it."""

    name: Literal["detection"] = "detection"
    alpha: Share = 0.5  # of the focal loss: the weight of what is there, 1 - alpha of what is not
    gamma: NonNegative = 2.0  # of the focal loss: how much what is easy counts less
    l1: NonNegative = 2.0  # weight of the boxes' L1 distance, in shares of the image
    giou: NonNegative = 1.0  # weight of 1 - generalised IoU
    detections: Count = 20  # per image, the surest ones
    sure: Share = 0.5  # from this score on, a detection counts for agreement and is drawn
    sizes: FirstLast = (32.0, 96.0)  # pixels: up to which root of its box's area an object is small, and medium; COCO's
    pictured: Count = 8  # images whose predictions are shown

    @model_validator(mode="after")
    def _sizes_rise(self) -> Self:
        if self.sizes[0] >= self.sizes[1]:
            raise ValueError(f"sizes is {list(self.sizes)}: first up to where objects are small, then medium")
        return self


class DetectorSettings(TimmSettings):
    """A timm model's tokens, and one linear layer that gives each token's classes and box."""

    classes: Count  # of objects
    stride: Count  # pixels a side that a token stands for


METRICS = TaskMetrics(
    columns=(
        Metric(
            "map",
            "mAP (%)",
            2,
            "mAP: COCO's average precision, mean over classes and IoU of .50 to .95",
            noun="mAP",
            percent=True,
        ),
        Metric("map50", "mAP50 (%)", 2, "mAP50: at IoU .50", percent=True),
        Metric(
            "agreement",
            "Agreement (%)",
            1,
            "agreement: of the dense model's sure detections, those that are made likewise",
            percent=True,
        ),
    ),
    figure="quality",
    bars=("map", "map50"),
    by_class="ap/",
    parts=(
        Metric("map_small", "small objects", 1, "small, medium, large: as task.sizes says"),
        Metric("map_medium", "medium objects", 1),
        Metric("map_large", "large objects", 1),
        Metric("map_rare", "rare classes", 1, "rare: the third of the classes with the fewest objects"),
    ),
)

SECTIONS = TaskSections(DetectionSettings, DetectorSettings, check=check_classification, metrics=METRICS)
