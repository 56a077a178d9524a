"""The sections of ``params.yaml`` for object detection: ``task`` and ``model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from maskllm4v.config.base import Count, FirstLast, NonNegative, Share
from maskllm4v.config.metrics import Metric, TaskMetrics
from maskllm4v.config.sections import JointAugmentationSettings, TaskSettings
from maskllm4v.config.tasks import TaskSections
from maskllm4v.tasks.classification.settings import CLASSES, TimmSettings, check_classification

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment

# What stays dense by default, by class of transformers: heads of classes and boxes, and what chooses the places that
# are looked at, of which a mask makes others.
_HEADS = ["class_labels_classifier", "bbox_predictor"]
_CHOICE = ["*.sampling_offsets", "*.attention_weights"]
_SELECTED = [
    "*class_embed",  # by both names that RT-DETR v2 and D-FINE have for them
    "*bbox_embed",
    "model.enc_output",
    "model.enc_score_head",
    "model.enc_bbox_head",
    "model.decoder.query_pos_head",
    *_CHOICE,
]
TRANSFORMERS = {
    "YolosForObjectDetection": _HEADS,
    # The first layer's values are made of zeros, which the queries begin as.
    "DetrForObjectDetection": [*_HEADS, "model.decoder.layers.0.self_attn.v_proj"],
    "RTDetrForObjectDetection": _SELECTED,
    "RTDetrV2ForObjectDetection": _SELECTED,
    "DFineForObjectDetection": [*_SELECTED, "model.decoder.pre_bbox_head", "model.decoder.lqe_layers"],
    "RfDetrForObjectDetection": [
        "*class_embed",
        "*bbox_embed",
        "model.enc_output",
        "model.decoder.ref_point_head",
        *_CHOICE,
    ],
}
LEARNED = ("YolosForObjectDetection", "DetrForObjectDetection")  # whose queries are parameters
MASKED = ("DetrForObjectDetection", "RfDetrForObjectDetection")  # that are told which pixels are padding
OF_TOKENS = ("alpha", "gamma", "l1", "giou")  # settings of a loss that models of transformers do not have


class DetectionSettings(JointAugmentationSettings, TaskSettings):
    """Average precision as COCO has it; the loss of tokens, that of transformers' models being their papers' own."""

    name: Literal["detection"] = "detection"
    alpha: Share = 0.5  # of the focal loss: the weight of what is there, 1 - alpha of what is not
    gamma: NonNegative = 2.0  # of the focal loss: how much what is easy counts less
    l1: NonNegative = 2.0  # weight of the boxes' L1 distance, in shares of the image
    giou: NonNegative = 1.0  # weight of 1 - generalised IoU
    detections: Count = 100  # per image, the surest ones; COCO counts no more
    sure: Share = 0.5  # from this score on, a detection counts for agreement and is drawn
    sizes: FirstLast = (32.0, 96.0)  # pixels: up to which root of its box's area an object is small, and medium; COCO's
    pictured: Count = 8  # images whose predictions are shown

    @model_validator(mode="after")
    def _sizes_rise(self) -> Self:
        if self.sizes[0] >= self.sizes[1]:
            raise ValueError(f"sizes is {list(self.sizes)}: first up to where objects are small, then medium")
        return self


def _known(name: str) -> str:
    if name[:1].isupper() and name not in CLASSES and name not in TRANSFORMERS:  # another library's class
        allowed = f"allowed for task 'detection': a timm model, {', '.join((*CLASSES, *TRANSFORMERS))}"
        raise PydanticCustomError("other_task", "{allowed}", {"allowed": allowed})
    return name


class DetectorSettings(TimmSettings):
    """A timm model's tokens and one linear layer that gives each token's classes and box; or one of transformers."""

    name: Annotated[str, AfterValidator(_known)]
    folder: str | None = Field(default=None, exclude_if=lambda value: value is None)  # of a model of transformers
    classes: Count  # of objects; of a model of transformers all that it tells apart
    stride: Count | None = None  # pixels a side that a token stands for

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
    def _keys_go_with_name(self) -> DetectorSettings:
        if self.of_transformers != (self.folder is not None):
            raise ValueError(
                f"folder is needed for a class of transformers and for no other model; found name {self.name!r}"
            )
        if self.of_transformers != (self.stride is None):
            raise ValueError(f"stride is needed for a timm model and for no other; found name {self.name!r}")
        for key in ("args", "stem"):
            if self.of_transformers and getattr(self, key):
                raise ValueError(f"{key} is not for {self.name!r}, whose folder says all of it")
        return self


def check_detection(experiment: Experiment) -> None:
    """Raise ``ValueError`` where settings do not go together."""
    check_classification(experiment)
    task, model = experiment.task, experiment.model
    assert isinstance(model, DetectorSettings)
    for key in OF_TOKENS:
        if model.of_transformers and getattr(task, key) != type(task).model_fields[key].default:
            raise ValueError(f"task.{key} is for models of tokens; {model.name} is trained with its paper's weights")


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

SECTIONS = TaskSections(DetectionSettings, DetectorSettings, check=check_detection, metrics=METRICS)
