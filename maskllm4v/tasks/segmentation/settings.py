"""The sections of ``params.yaml`` for semantic segmentation: ``task`` and ``model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from maskllm4v.config.base import Count
from maskllm4v.config.metrics import Metric, TaskMetrics
from maskllm4v.config.sections import JointAugmentationSettings, TaskSettings
from maskllm4v.config.tasks import TaskSections
from maskllm4v.tasks.classification.settings import CLASSES, InputSettings, TimmSettings, check_classification

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment

SAM = "SamModel"  # of it the encoder, with a linear layer behind it
TRANSFORMERS = {  # its classes, and what of each stays dense by default: heads, and what chooses where to look
    "SegformerForSemanticSegmentation": ["decode_head.classifier"],
    "DPTForSemanticSegmentation": ["head"],
    "UperNetForSemanticSegmentation": ["decode_head.classifier"],
    "Mask2FormerForUniversalSegmentation": [
        "class_predictor",
        "*.mask_embedder",
        "*.sampling_offsets",
        "*.attention_weights",
    ],
    "EomtForUniversalSegmentation": ["class_predictor", "mask_head"],
    "EomtDinov3ForUniversalSegmentation": ["class_predictor", "mask_head"],
    SAM: ["head"],
}


class SegmentationSettings(JointAugmentationSettings, TaskSettings):
    """Cross-entropy for each pixel; mean intersection over union."""

    name: Literal["segmentation"] = "segmentation"
    border: Count = 3  # pixels: how far the border between two classes reaches to either side, where it is judged alone
    pictured: Count = 8  # images whose predictions are shown


def _known(name: str) -> str:
    if name[:1].isupper() and name not in CLASSES and name not in TRANSFORMERS:  # another library's class
        allowed = f"allowed for task 'segmentation': a timm model, {', '.join((*CLASSES, *TRANSFORMERS))}"
        raise PydanticCustomError("other_task", "{allowed}", {"allowed": allowed})
    return name


class SegmenterInput(InputSettings):
    """What of the model's own data configuration, timm's or its folder's, to overrule."""

    img_size: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None  # type: ignore[assignment]
    # squash: to the model's size whatever the shape; letterbox: shape kept, the rest padded and ignored
    mode: Literal["squash", "letterbox"] = Field(default="squash", exclude_if=lambda value: value == "squash")

    @model_validator(mode="after")
    def _nothing_is_cut_off(self) -> SegmenterInput:
        if self.crop_pct is not None or self.crop_mode is not None:
            raise ValueError("crop_pct and crop_mode are for classification: every pixel of a mask counts")
        return self


class SegmenterSettings(TimmSettings):
    """A timm model's tokens and one linear layer that gives the classes of each token's pixels; or transformers'."""

    name: Annotated[str, AfterValidator(_known)]
    folder: str | None = Field(default=None, exclude_if=lambda value: value is None)  # of a model of transformers
    input: SegmenterInput = SegmenterInput()
    classes: Count  # of pixels, the ground included
    # Pixels a side that a token stands for, of models with that linear layer; logits are resized to the masks' size.
    stride: Count | None = None

    @property
    def of_transformers(self) -> bool:
        """Whether ``name`` is a class of transformers."""
        return self.name in TRANSFORMERS

    @model_validator(mode="before")
    @classmethod
    def _heads_stay_dense(cls, raw: Any) -> Any:
        name = raw.get("name") if isinstance(raw, dict) else None
        return {"exclude": TRANSFORMERS[name], **raw} if isinstance(name, str) and name in TRANSFORMERS else raw

    def defaults(self) -> dict[str, Any]:
        own = {"exclude": TRANSFORMERS[self.name]} if self.of_transformers else {}
        return super().defaults() | own

    @model_validator(mode="after")
    def _keys_go_with_name(self) -> SegmenterSettings:
        if self.of_transformers != (self.folder is not None):
            raise ValueError(
                f"folder is needed for a class of transformers and for no other model; found name {self.name!r}"
            )
        for key in ("args", "stem"):
            if self.of_transformers and getattr(self, key):
                raise ValueError(f"{key} is not for {self.name!r}, whose folder says all of it")
        if (not self.of_transformers or self.name == SAM) != (self.stride is not None):
            raise ValueError(
                f"stride is needed for a timm model and {SAM}, and for no other model; found name {self.name!r}"
            )
        return self


def check_segmentation(experiment: Experiment) -> None:
    """Raise ``ValueError`` where settings do not go together."""
    check_classification(experiment)
    model = experiment.model
    assert isinstance(model, SegmenterSettings)
    if experiment.dense.init == "pretrained" and model.stride is not None:
        raise ValueError(
            f"dense.init is 'pretrained', which says nothing of the linear layer behind {model.name}; "
            "allowed: checkpoint, of the whole segmenter, or scratch"
        )


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
