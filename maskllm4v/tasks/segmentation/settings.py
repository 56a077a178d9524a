"""The sections of ``params.yaml`` for semantic segmentation: ``task`` and ``model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from maskllm4v.config.base import Count
from maskllm4v.config.metrics import Metric, TaskMetrics
from maskllm4v.config.sections import TaskSettings
from maskllm4v.config.tasks import TaskSections
from maskllm4v.tasks.classification.settings import TimmSettings, check_classification

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment


class SegmentationSettings(TaskSettings):
    """Cross-entropy for each pixel; mean intersection over union."""

    name: Literal["segmentation"] = "segmentation"
    border: Count = 3  # pixels: how far the border between two classes reaches to either side, where it is judged alone
    pictured: Count = 8  # images whose predictions are shown


class SegmenterSettings(TimmSettings):
    """A timm model's tokens, and one linear layer that gives the classes of each token's pixels."""

    classes: Count  # of pixels, the ground included
    stride: Count  # pixels a side that a token stands for


def check_segmentation(experiment: Experiment) -> None:
    """Raise ``ValueError`` where settings do not go together."""
    check_classification(experiment)


METRICS = TaskMetrics(
    columns=(
        Metric(
            "miou",
            "mIoU (%)",
            2,
            "mIoU: mean over classes of intersection over union, all images together",
            noun="mIoU",
            percent=True,
        ),
        Metric("pixel_accuracy", "Pixel accuracy (%)", 2, percent=True),
        Metric("agreement", "Agreement (%)", 1, "agreement: pixels with the dense model's class", percent=True),
    ),
    figure="quality",
    bars=("miou",),
    by_class="iou/",
    parts=(
        Metric("miou_border", "near borders", 1, "near borders between classes, within task.border pixels of one"),
        Metric("miou_inner", "inside", 1, "inside: all other pixels"),
        Metric("miou_rare", "rare classes", 1, "rare: the third of the classes with the fewest pixels"),
    ),
)

SECTIONS = TaskSections(SegmentationSettings, SegmenterSettings, check=check_segmentation, metrics=METRICS)
