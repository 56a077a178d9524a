"""The sections of ``params.yaml`` for image classification: ``task`` and ``model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from maskllm4v.config.base import Count, NonNegative, Positive, Settings, Share
from maskllm4v.config.metrics import Metric, TaskMetrics
from maskllm4v.config.sections import AugmentationSettings, ModelSettings, TaskSettings
from maskllm4v.config.tasks import TaskSections

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment

PLAIN_VIT = "VisionTransformer"
CLASSES = (PLAIN_VIT, "Eva")  # of timm, built from ``args`` alone


class ClassificationSettings(AugmentationSettings, TaskSettings):
    """Augmentation, loss, evaluation. Names are timm's where it has them."""

    name: Literal["classification"] = "classification"
    label_smoothing: Share = 0.0
    mixup: NonNegative = 0.0  # alpha; 0: off
    cutmix: NonNegative = 0.0
    mix_probability: Share = 1.0


class InputSettings(Settings):
    """What of the model's own data configuration (timm's) to overrule."""

    img_size: Count | None = None  # pixels; for models that take any size (those that do not: model.args)
    mean: list[float] | None = None
    std: list[Positive] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None


class StemSettings(Settings):
    """timm's convolutional stem in the place of the patch embedding: BN and ReLU between convolutions."""

    channels: Annotated[list[Count], Field(min_length=1)]
    strides: Annotated[list[Count], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_stride_each(self) -> StemSettings:
        if len(self.channels) != len(self.strides):
            raise ValueError(f"{len(self.channels)} channels, but {len(self.strides)} strides")
        return self


def _of_timm(name: str) -> str:
    if name[:1].isupper() and name not in CLASSES:  # another library's class
        raise PydanticCustomError("other_task", "allowed for task 'classification': a timm model")
    return name


class TimmSettings(ModelSettings):
    """A timm model by name, or ``VisionTransformer`` or ``Eva`` built from ``args``."""

    name: Annotated[str, AfterValidator(_of_timm)]
    exclude: list[str] = ["head"]  # linear layers that stay dense, by name pattern
    stem: StemSettings | None = None  # of those built from args only
    input: InputSettings = InputSettings()


def check_classification(experiment: Experiment) -> None:
    """Raise ``ValueError`` where a row is to be made from generated images."""
    made_from: tuple[dict[str, Any], ...] = (experiment.priors, experiment.learned, experiment.updated)
    inputs = {row: made.inputs for rows in made_from for row, made in rows.items()}
    if generated := [row for row, kind in inputs.items() if kind != "data"]:
        raise ValueError(f"{generated[0]}: inputs is 'generated', which task 'classification' cannot make")


METRICS = TaskMetrics(
    columns=(
        Metric("top1", "Top-1 (%)", 2, noun="top-1", axis="top-1 accuracy (%)", percent=True),
        Metric("top5", "Top-5 (%)", 2, percent=True),
        Metric("nll", "Cross-entropy", 3, better="lower"),
        Metric("ece", "ECE (%)", 1, "ECE: expected calibration error, 15 bins", percent=True, better="lower"),
        Metric("agreement", "Agreement (%)", 1, "agreement: same top-1 class as the dense model", percent=True),
    ),
    figure="accuracy",
    bars=("top1",),
)

SECTIONS = TaskSections(ClassificationSettings, TimmSettings, check=check_classification, metrics=METRICS)
