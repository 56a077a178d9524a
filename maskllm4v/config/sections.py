"""The sections of ``params.yaml``, one class each; defaults and units stand here and nowhere else.

Those of a task, which are ``task``, ``model`` and ``evaluation``, stand in ``maskllm4v/tasks/<task>/settings.py``
(:mod:`maskllm4v.config.tasks`).

Records hold what differs from the defaults. A new setting with one leaves all records as they are; to change a default
takes a migration of them, see :meth:`maskllm4v.config.Row.record_settings`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from maskllm4v.config.base import (
    Betas,
    Count,
    FirstLast,
    NonNegative,
    Number,
    Pattern,
    Positive,
    Seed,
    Settings,
    Share,
    Slug,
)
from maskllm4v.utils.errors import ConfigError

# What a row learns or calibrates from: the data, or samples that the dense model makes (diffusion). Not written
# down where it is the data, so that what lies beside artifacts has the bytes that it had before the choice.
Inputs = Literal["data", "generated"]
REAL: Any = Field("data", exclude_if=lambda value: value == "data")

# What logits stand for (:mod:`maskllm4v.sparsity.parameterization`); not written down where they belong to candidates,
# for the same reason.
Gate = Literal["candidates", "positions"]
CANDIDATES: Any = Field("candidates", exclude_if=lambda value: value == "candidates")

# Of the dense model's hidden channels, before it is pruned; its outputs stay the same. Written down like the inputs.
Permutation = Literal["none", "greedy"]
UNPERMUTED: Any = Field("none", exclude_if=lambda value: value == "none")


def _unwritten(default: Any) -> Any:
    """A setting of one source of data: at its default it is not written down, as before there was that source."""
    return Field(default, exclude_if=lambda value: value == default)


EMBEDDED = {"digits", "scenes"}  # sources that need no files of the user
ANNOTATED = ("coco", "masks")  # sources of the user's files that have no label, but boxes or masks
OWN_KEYS = {"masks": ("ignored", "zero_is_ignored", "suffix", "image_suffix"), "coco": ("empty_boxes",)}


class SceneSettings(Settings):
    """Scenes of scikit-learn's digits on a textured ground (:mod:`maskllm4v.data.scenes`)."""

    train: Count = 8000  # scenes
    test: Count = 500
    size: Count = 32  # pixels a side
    sides: list[Count] = [12, 14, 16]  # of digits, in pixels
    digits: Annotated[tuple[Number, Number], Field(strict=False)] = (2, 4)  # fewest and most in a scene

    @model_validator(mode="after")
    def _digits_fit(self) -> SceneSettings:
        if not self.sides or max(self.sides) > self.size:
            raise ValueError(f"sides is {self.sides}: digits have to fit into scenes of {self.size} pixels")
        if self.digits[0] > self.digits[1]:
            raise ValueError(f"digits is {list(self.digits)}: first the fewest, then the most")
        return self


class SplitPaths(Settings):
    """What both splits have one of: a folder or a file below ``data.root``."""

    train: str
    test: str


def _count_or_names(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names):
        return value
    if value is None or (type(value) is int and value > 0):
        return value
    raise PydanticCustomError("classes", "allowed: a number, a list of names, or a file with one name per line")


Classes = Annotated[int | list[str] | str | None, BeforeValidator(_count_or_names)]


class DataSettings(Settings):
    """Where the images come from, and how they are split."""

    name: Slug  # of the folder artifacts/data/<name>/
    source: Literal["coco", "digits", "folder", "masks", "scenes", "timm"]
    # folder: holds one folder a split, which hold one folder a class; timm: as timm reads it; masks, coco: holds all
    # that the keys below name
    root: str | None = None
    dataset: str | None = None  # timm: as in timm.data.create_dataset, e.g. "torch/cifar10" or "hfds/org/name"
    train: str = "train"  # masks, coco: the folder of the pictures
    test: str = "val"
    # How many there have to be; an error if there are others. masks: their names in the order of the values, or a text
    # file below root with one name per line; coco names them itself.
    classes: Classes = None
    masks: SplitPaths | None = _unwritten(None)  # masks: folders of the masks, laid out as those of the pictures
    annotations: SplitPaths | None = _unwritten(None)  # coco: JSON files, both with the same categories
    ignored: Annotated[int, Field(ge=0, le=255)] = _unwritten(255)  # masks: the value of pixels that belong to no class
    zero_is_ignored: bool = _unwritten(
        False
    )  # masks: 0 is ignored, too, and classes begin at 1 (ADE20K's reduced zero label)
    suffix: str = _unwritten(".png")  # masks: how a mask's name goes on after its picture's
    image_suffix: str | None = _unwritten(
        None
    )  # masks: how pictures' names end, e.g. _leftImg8bit.png; None: any image type
    empty_boxes: Literal["error", "drop"] = _unwritten("error")  # coco: those without area; COCO itself has some
    hash_files: bool = False  # folder, masks, coco: read every file, check that it is an image, and take its SHA-256
    in_memory: Count | None = None  # folder, timm: decode once, to squares of so many pixels, and keep them
    holdout: Number = 0  # images taken out of the training split, to choose settings or checkpoints on
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5  # digits
    scenes: SceneSettings = _unwritten(SceneSettings())  # scenes
    split_seed: Seed = 0  # digits, scenes, and which images are held out
    calibration: Count = 128  # images a calibration set
    calibration_seed: int = 0
    calibration_sets: Count = 1  # disjoint ones; the seeds of a table take turns
    calibration_split: Literal["train", "test"] = "train"  # test: as the original does; it leaks, and is marked so

    @model_validator(mode="after")
    def _keys_go_with_source(self) -> DataSettings:
        if self.source in ("folder", *ANNOTATED) and self.root is None:
            raise ValueError(f"root is needed for source {self.source!r}")
        if self.source in EMBEDDED and self.root is not None:
            raise ValueError(f"root is not for source {self.source!r}, which comes with scikit-learn")
        if self.source in EMBEDDED and self.in_memory is not None:
            raise ValueError(f"in_memory is not for source {self.source!r}, whose images are in memory anyway")
        if self.source != "scenes" and self.scenes != SceneSettings():
            raise ValueError(f"scenes is for source 'scenes' only; found source {self.source!r}")
        if (self.source == "timm") != (self.dataset is not None):
            raise ValueError(f"dataset is needed for source 'timm' and for no other; found source {self.source!r}")
        self._keys_go_with_annotations()
        return self

    def _keys_go_with_annotations(self) -> None:
        for key, source in (("masks", "masks"), ("annotations", "coco")):
            if (getattr(self, key) is not None) != (self.source == source):
                raise ValueError(
                    f"{key} is needed for source {source!r} and for no other; found source {self.source!r}"
                )
        for source, keys in OWN_KEYS.items():
            given = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
            if given and self.source != source:
                raise ValueError(f"{given[0]} is for source {source!r} only; found source {self.source!r}")
        if self.source == "masks" and not isinstance(self.classes, str | list):
            raise ValueError("classes is needed for source 'masks': a list of names, or a file with one name per line")
        if self.source != "masks" and not isinstance(self.classes, int | None):
            raise ValueError(f"classes is {self.classes!r}; allowed for source {self.source!r}: how many there are")
        if self.source in ANNOTATED and self.in_memory is not None:
            raise ValueError(f"in_memory is not for source {self.source!r}")
        if self.annotations is not None and self.annotations.train == self.annotations.test:
            raise ValueError(f"annotations.train and annotations.test are both {self.annotations.train!r}")


class AugmentationSettings(Settings):
    """What is done to training images. Names are timm's where it has them."""

    # images in memory (digits, data.in_memory)
    shift: Number = 0  # pixels, either way
    shift_probability: Share = 1.0
    hflip: Share = 0.0
    # images decoded on the way (folder, timm), through timm's training transform
    crop_scale: FirstLast | None = None  # of the random resized crop's area
    crop_ratio: FirstLast | None = None
    train_interpolation: Literal["random", "bilinear", "bicubic"] | None = None  # None: the model's own
    color_jitter: NonNegative = 0.4
    auto_augment: str | None = None  # e.g. rand-m8-inc1-mstd101
    random_erasing: Share = 0.0
    erasing_mode: Literal["const", "rand", "pixel"] = "const"


class JointAugmentationSettings(Settings):
    """What is done to training images and their masks and boxes together; nothing by default. Not for ``scenes``."""

    hflip: Share = 0.0
    # One of the two, or images are brought to the model's size as in evaluation.
    crop_scale: FirstLast | None = None  # random resized crop: of its area
    crop_ratio: FirstLast = (0.75, 4 / 3)
    scale_jitter: FirstLast | None = None  # of the size at which an image fits the model's; then cropped or padded
    color_jitter: NonNegative = 0.0  # of brightness, contrast and saturation

    @model_validator(mode="after")
    def _one_way_to_crop(self) -> Self:
        if self.crop_scale is not None and self.scale_jitter is not None:
            raise ValueError("one of crop_scale and scale_jitter, not both")
        for key in ("crop_scale", "crop_ratio", "scale_jitter"):
            if (values := getattr(self, key)) is not None and values[0] > values[1]:
                raise ValueError(f"{key} is {list(values)}: first the least, then the most")
        if self.crop_scale is not None and self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale is {list(self.crop_scale)}; allowed: shares of an image's area, up to 1")
        return self


class TaskSettings(Settings):
    """What every task has; each has more."""

    name: str
    eval_batch_size: Count = 256
    eval_amp: Literal["no", "bf16", "fp16"] = "no"
    eval_split: Literal["test", "holdout"] = "test"  # what a table reports; holdout: to choose settings


class ModelSettings(Settings):
    """What every dense architecture has; those of a task have more."""

    name: str
    args: dict[str, Any] = {}
    exclude: list[str] = []  # linear layers that stay dense, by name pattern
    on_misfit: Literal["error", "skip"] = "error"
    convolutions: bool = Field(default=False, exclude_if=lambda value: not value)  # prune 1×1 and patchifying ones, too
    fused_attention: bool = True  # false: one attention kernel, chosen explicitly

    @property
    def excluded_layers(self) -> list[str]:
        """Name patterns of the linear layers that stay dense."""
        return self.exclude


class NoEvaluation(Settings):
    """``evaluation`` of a task whose own section says all of it."""


class TrainingSettings(Settings):
    """What every training has, whatever is trained."""

    steps: Count | None = None  # one of the two
    epochs: Positive | None = None
    batch_size: Count = 128  # over all processes and micro-batches
    accumulate: Count = 1  # micro-batches a step
    optimizer: str = "adamw"  # or any of timm's
    optimizer_args: dict[str, Any] = {}
    lr: Positive = 1e-3
    min_lr: NonNegative = 0.0
    warmup: Share = 0.0  # share of the steps
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    clip_grad: NonNegative = 2.0  # 0: off
    anneal: Literal["step", "epoch"] = "step"  # how often lr (and tau and scaling) move
    amp: Literal["no", "bf16", "fp16"] = "no"
    grad_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False  # torch.compile
    log_every: Count = 10

    @model_validator(mode="after")
    def _not_steps_and_epochs(self) -> TrainingSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("one of steps and epochs, not both")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}, which does not divide batch_size {self.batch_size}")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """How many steps the whole training has.

        Raises:
            ConfigError: neither steps nor epochs are given.
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ConfigError("a training needs steps or epochs")
        return max(1, math.floor(self.epochs * steps_per_epoch + 0.5))


class ProgressiveSettings(Settings):
    """Progressive resizing: smaller images at first."""

    size: Count  # pixels
    steps: Count


class DenseSettings(TrainingSettings):
    """The dense model: trained here, loaded from a file, or pretrained through timm."""

    row: Slug
    init: Literal["scratch", "checkpoint", "pretrained"]
    checkpoint: str | None = None  # a state dict, as safetensors or as PyTorch saves it; no code in it is run
    shared: bool = False  # scratch: one model, of the first seed, for all seeds (as it is for the other inits)
    batch_size: Count = 64
    weight_decay: NonNegative = 0.05
    warmup: Share = 0.1
    clip_grad: NonNegative = 1.0
    log_every: Count = 50
    progressive: ProgressiveSettings | None = None

    @model_validator(mode="after")
    def _keys_go_with_init(self) -> DenseSettings:
        if (self.init == "checkpoint") != (self.checkpoint is not None):
            raise ValueError(f"checkpoint is needed for init 'checkpoint' and no other; found init {self.init!r}")
        if self.init == "scratch" and self.steps is None and self.epochs is None:
            raise ValueError("steps or epochs is needed for init 'scratch'")
        return self


class PriorSettings(Settings):
    """One one-shot row."""

    method: str
    pattern: Pattern | None = None  # None: the table's
    update_weights: bool = False
    propagate: Literal["dense", "pruned"] | None = None  # None: as the method's authors do
    batch_size: Count = 128
    inputs: Inputs = REAL
    permutation: Permutation = UNPERMUTED


class LearningSettings(TrainingSettings):
    """How masks are learned (MaskLLM, arXiv 2409.17481); the defaults of all learned rows."""

    min_lr: NonNegative = 1e-4
    tau: FirstLast = (4.0, 0.05)  # at the first step, at the last
    scaling: FirstLast = (10.0, 100.0)
    regularisation: NonNegative = 1e-5  # λ of −λ·Σ(masked weight)²
    init: Literal["prior", "magnitude"] = "prior"
    prior_strength: NonNegative = 3.0
    gate_std: NonNegative = 0.2
    hard: bool = False
    gate: Gate = CANDIDATES
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the logits' average; 0: off
    distillation: Share = 0.0  # weight of the dense model's outputs against the labels
    distillation_temperature: Positive = 2.0
    select: Literal["last", "best"] = "last"  # best: by the task's score on the held-out slice, once an epoch
    inputs: Inputs = REAL


class LearnedSettings(LearningSettings):
    """One learned row: ``learning`` with this row's own values on top."""

    prior: Slug  # the one-shot or updated row whose masks training starts from
    # Dense, or updated: the prior's weights where its mask keeps them, dense ones elsewhere. Not written down where
    # they are dense, see above.
    weights: Literal["dense", "updated"] = Field("dense", exclude_if=lambda value: value == "dense")


AS_SPARSEGPT: dict[str, Any] = {"target": "symmetric", "damping": 0.01}  # defaults of its update, as its authors do


class UpdateSettings(Settings):
    """How the kept weights are updated to compensate for the pruned ones; nothing is trained."""

    update: Literal["none", "least_squares", "sparsegpt"]  # none: dense weights, whatever the other row's are
    # What each layer's outputs are fitted to: the dense network's, or those of the dense weights on the layer's inputs
    # as they have become (all that SparseGPT knows).
    target: Literal["asymmetric", "symmetric"] = "asymmetric"
    damping: NonNegative = 0.1  # share of the mean diagonal of the inputs' Hessian; sparsegpt: 0.01, as its authors
    batch_size: Count = 128
    inputs: Inputs = REAL

    @model_validator(mode="before")
    @classmethod
    def _sparsegpt_as_its_authors(cls, raw: Any) -> Any:
        return {**AS_SPARSEGPT, **raw} if isinstance(raw, dict) and raw.get("update") == "sparsegpt" else raw

    def defaults(self) -> dict[str, Any]:
        return super().defaults() | (AS_SPARSEGPT if self.update == "sparsegpt" else {})

    @model_validator(mode="after")
    def _target_goes_with_update(self) -> Self:
        if self.update == "sparsegpt" and self.target != "symmetric":
            raise ValueError(f"target is {self.target!r}; allowed for update 'sparsegpt': 'symmetric'")
        defaults = UpdateSettings.model_fields.items()
        given = [key for key, field in defaults if key != "update" and getattr(self, key) != field.default]
        if self.update == "none" and given:
            raise ValueError(f"{given[0]} is {getattr(self, given[0])!r}, but update is 'none'")
        return self


class UpdatedSettings(UpdateSettings):
    """One row with the masks of another row, whose kept weights are updated to compensate for the pruned ones."""

    masks: Slug  # the one-shot or learned row


class FinetunedSettings(TrainingSettings):
    """A control: weights trained on, dense or under a fixed mask, for as long as a mask is learned."""

    start: Slug  # the dense row, or the one-shot row whose mask stays fixed
    min_lr: NonNegative = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the weights' average; 0: off


class ExportSettings(Settings):
    """How a row's folded model is written: its first seed's, into ``artifacts/exports/<row>/``."""

    formats: Annotated[list[Literal["packed", "mask", "dense", "onnx"]], Field(min_length=1)] = ["packed", "dense"]
    dtypes: Annotated[list[Literal["fp32", "fp16", "bf16"]], Field(min_length=1)] = ["fp32", "fp16"]

    @model_validator(mode="after")
    def _onnx_has_no_bf16(self) -> ExportSettings:
        if "onnx" in self.formats and not {"fp32", "fp16"} & set(self.dtypes):
            raise ValueError("formats holds 'onnx', which is written in fp32 and fp16; dtypes has neither")
        return self

    def files(self) -> list[tuple[str, str | None]]:
        """Format and type of each file; masks have none, and ONNX is not written in bf16."""
        found: list[tuple[str, str | None]] = []
        for name in dict.fromkeys(self.formats):
            types = [None] if name == "mask" else [d for d in self.dtypes if (name, d) != ("onnx", "bf16")]
            found += [(name, dtype) for dtype in dict.fromkeys(types)]
        return found


class RuntimeSettings(Settings):
    """Where and how to compute: not tracked. Records name hardware and number of processes.

    Several processes add in another order and draw noise of their own; nothing else here changes a result.
    """

    device: str = "auto"
    processes: Number = 0  # that train and evaluate together; 0: one a GPU
    loader_workers: Number = 0
    seed_processes: Number = 0  # seeds side by side; 0: all at once where that is exact, otherwise one
    checkpoint_minutes: NonNegative = 5.0  # between two saved states of a training; 0: never
    checkpoint_steps: Number = 0  # the same in steps; 0: by minutes alone
    live: bool = True  # show the curves of trainings in MLflow while they run, where it has a store
