"""The sections of ``params.yaml`` for diffusion transformers: ``task``, ``model`` and ``evaluation``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from maskllm4v.config.base import Count, Number, Positive, Settings, Share
from maskllm4v.config.metrics import Metric, TaskMetrics
from maskllm4v.config.sections import AugmentationSettings, ModelSettings, TaskSettings, TrainingSettings
from maskllm4v.config.tasks import TaskSections
from maskllm4v.tasks.classification.settings import ClassificationSettings, TimmSettings

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment

GRID = [207, 360, 387, 974, 88, 979, 417, 279]  # the classes of the original's pictures


class SamplingSettings(Settings):
    """How images are made from noise."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: Count = 250
    guidance: Annotated[float, Field(ge=1)] = 4.0  # classifier-free (Ho & Salimans 2022); 1: none
    guided_channels: Count | None = None  # how many of the first channels; None: all. DiT's authors guide 3 of 4
    clip: bool = False  # predicted images to [-1, 1]; for pixels

    @model_validator(mode="after")
    def _from_noise_to_image(self) -> Self:
        if self.sampler == "ddpm" and self.steps < 2:
            raise ValueError("steps is 1, but DDPM goes from the last timestep to the first: 2 at least")
        return self


class BankSettings(SamplingSettings):
    """Samples of the dense model, in the place of data."""

    samples: Count = 1024


class EvaluationSettings(SamplingSettings):
    """What ``evaluate`` measures and pictures; other stages do not depend on it."""

    images: Number = 0  # of the reported split, for the squared errors; 0: all
    timesteps: Count = 10  # at how many, the middles of equal parts
    samples: Number = 0  # to judge; needs task.judge
    grid: Annotated[list[Number], Field(min_length=1)] | None = None  # classes of the pictured samples
    columns: Count = 4  # of the picture

    def pictured(self, classes: int) -> list[int]:
        """``grid``, or else the classes of the original's pictures; the first ones of models that have fewer."""
        return self.grid or (GRID if classes > max(GRID) else list(range(min(len(GRID), classes))))

    @model_validator(mode="after")
    def _samples_spread(self) -> EvaluationSettings:
        if self.samples == 1:
            raise ValueError("samples is 1, but distances need two at least; 0: none")
        return self


class JudgeSettings(Settings):
    """The classifier that samples are judged by, trained on the same images."""

    task: ClassificationSettings = ClassificationSettings()
    model: TimmSettings
    training: TrainingSettings

    @model_validator(mode="after")
    def _can_be_trained(self) -> JudgeSettings:
        if self.training.steps is None and self.training.epochs is None:
            raise ValueError("training needs steps or epochs")
        if self.task.eval_split != "test":
            raise ValueError("task.eval_split is not the judge's to say, but task's")
        return self


class DiffusionSettings(TaskSettings):
    """Class-conditional denoising (Ho et al. 2020; Peebles & Xie 2022)."""

    name: Literal["diffusion"] = "diffusion"
    vae: str | None = None  # folder of a diffusers AutoencoderKL; None: in pixels
    scheduler: str | None = None  # folder of a diffusers scheduler, whose noise schedule goes before the next four
    train_timesteps: Count = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: Positive = 1e-4
    beta_end: Positive = 0.02
    hflip: Share = 0.0
    label_dropout: Share = 0.1  # of the labels, in training and calibration, for guidance
    conditioning_samples: Count = 4096  # that calibrate adaLN layers, which see one row a sample, not one a token
    bank: BankSettings = BankSettings()
    judge: JudgeSettings | None = None

    @property
    def augmentation(self) -> AugmentationSettings:
        """Images whole, and none but flips."""
        return AugmentationSettings(hflip=self.hflip, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), color_jitter=0.0)

    @model_validator(mode="after")
    def _betas_rise(self) -> DiffusionSettings:
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end is {self.beta_end}, below beta_start {self.beta_start}")
        return self


class DiTSettings(ModelSettings):
    """A diffusion transformer, of diffusers' architecture; ``exclude``: layers outside its blocks stay dense anyway."""

    name: Literal["DiTTransformer2DModel"]
    adaln: bool = True  # prune the blocks' adaLN modulation, too
    # Of the timesteps' frequencies: 0 as DiT's authors have it, and so all published weights; 1 as diffusers builds it.
    freq_shift: Literal[0, 1] = 0

    @model_validator(mode="after")
    def _sizes_are_numbers(self) -> Self:
        for name in ("sample_size", "in_channels", "out_channels", "num_embeds_ada_norm"):
            if not isinstance(found := self.args.get(name), int | None):
                raise ValueError(f"args.{name} is {found!r}, which is no whole number")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the model's inputs, ``(C, H, W)``."""
        size = self._argument("sample_size", 32)
        return self._argument("in_channels", 4), size, size

    @property
    def classes(self) -> int:
        """How many there are; the label of that number stands for none."""
        return self._argument("num_embeds_ada_norm", 1000)

    @property
    def learned_sigma(self) -> bool:
        """Whether the model gives out its variance, too: 2·C channels."""
        return self._argument("out_channels", self.shape[0]) == 2 * self.shape[0]

    def _argument(self, name: str, default: int) -> int:
        """As given, or diffusers' default."""
        found: int | None = self.args.get(name)
        return default if found is None else found

    @property
    def excluded_layers(self) -> list[str]:
        """Name patterns of the linear layers that stay dense: all that do not belong to a block's own work."""
        modulation = [] if self.adaln else ["transformer_blocks.*.norm1.linear"]
        return ["transformer_blocks.*.norm1.emb", "proj_out_1", "proj_out_2", *modulation, *self.exclude]


def check_sampling(model: DiTSettings, evaluation: EvaluationSettings) -> None:
    """Raise ``ValueError`` where pictures are asked for that a model cannot make."""
    if wrong := [label for label in evaluation.grid or () if label >= model.classes]:
        raise ValueError(f"evaluation.grid: no class {wrong[0]}; the model has {model.classes}")
    if (evaluation.guided_channels or 0) > model.shape[0]:
        raise ValueError(f"evaluation.guided_channels is {evaluation.guided_channels}; there are {model.shape[0]}")


def check_diffusion(experiment: Experiment) -> None:
    """Raise ``ValueError`` where settings of a diffusion experiment do not go together."""
    task, model, evaluation = experiment.task, experiment.model, experiment.evaluation
    assert isinstance(task, DiffusionSettings)
    assert isinstance(model, DiTSettings)
    assert isinstance(evaluation, EvaluationSettings)
    trains = "the variance's channels get no gradient from the noise's error"
    if evaluation.samples and task.judge is None:
        raise ValueError(f"evaluation.samples is {evaluation.samples}, which needs task.judge")
    if evaluation.timesteps > task.train_timesteps:
        raise ValueError(f"evaluation.timesteps is {evaluation.timesteps}, but there are {task.train_timesteps}")
    check_sampling(model, evaluation)
    if (task.bank.guided_channels or 0) > model.shape[0]:
        raise ValueError(f"task.bank.guided_channels is {task.bank.guided_channels}; there are {model.shape[0]}")
    for section, sampling in (("evaluation", evaluation), ("task.bank", task.bank)):
        if experiment.dense.init == "scratch" and not task.label_dropout and sampling.guidance > 1:
            raise ValueError(f"{section}.guidance is {sampling.guidance}, which needs task.label_dropout in training")
    if experiment.dense.progressive is not None:
        raise ValueError("dense.progressive is for task 'classification' only")
    if model.learned_sigma and experiment.dense.init == "scratch":
        raise ValueError(f"model.args.out_channels is twice in_channels, but {trains}; load such a model")
    if model.learned_sigma and experiment.finetuned:
        raise ValueError(f"finetuned.{min(experiment.finetuned)}: {trains}")
    for row, learned in experiment.learned.items():
        if model.learned_sigma and not learned.distillation:
            raise ValueError(f"learned.{row}.distillation is 0, but {trains}; give distillation some weight")
        if learned.inputs == "generated" and learned.batch_size > task.bank.samples:
            raise ValueError(
                f"learned.{row}.batch_size is {learned.batch_size}, but task.bank.samples is {task.bank.samples}"
            )


METRICS = TaskMetrics(
    columns=(
        Metric(
            "eps_mse",
            "ε-MSE",
            4,
            "ε-MSE: mean squared error of the predicted noise, lower is better",
            better="lower",
        ),
        Metric(
            "dense_mse",
            "MSE to dense",
            4,
            "MSE to dense: mean squared distance of the outputs to the dense model's",
            better="lower",
        ),
        Metric(
            "accuracy",
            "Conditional accuracy (%)",
            1,
            "conditional accuracy: share of samples that a classifier trained here takes for their class",
            axis="conditional accuracy (%)",
            percent=True,
        ),
        Metric(
            "fd",
            "FD (our classifier)",
            2,
            "FD: Fréchet distance in that classifier's features, not FID",
            better="lower",
        ),
        Metric("kd", "KD (our classifier)", 4, "KD: kernel distance, likewise", better="lower"),
    ),
    figure="quality",
    bars=("accuracy", "eps_mse"),
    decimals=6,
    facts=(("judge_accuracy", "it gets {:.1f} % of the real images right"),),
)

# Masks are learned from the dense model's outputs unless told otherwise.
SECTIONS = TaskSections(
    DiffusionSettings, DiTSettings, EvaluationSettings, {"distillation": 1.0}, check_diffusion, METRICS
)
