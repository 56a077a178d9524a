"""The sections of ``params.yaml`` for semantic segmentation: ``task`` and ``model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from maskllm4v.config.base import Count
from maskllm4v.config.sections import JointAugmentationSettings, TaskSettings
from maskllm4v.config.tasks import TaskSections
from maskllm4v.tasks.classification.settings import TimmSettings, check_classification

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment


class SegmentationSettings(JointAugmentationSettings, TaskSettings):
    """Cross-entropy for each pixel; mean intersection over union."""

    name: Literal["segmentation"] = "segmentation"
    pictured: Count = 8  # images whose predictions are shown


class SegmenterSettings(TimmSettings):
    """A timm model's tokens, and one linear layer that gives the classes of each token's pixels."""

    classes: Count  # of pixels, the ground included
    stride: Count  # pixels a side that a token stands for


def check_segmentation(experiment: Experiment) -> None:
    """Raise ``ValueError`` where settings do not go together."""
    check_classification(experiment)


SECTIONS = TaskSections(SegmentationSettings, SegmenterSettings, check=check_segmentation)
