"""``params.yaml`` as frozen, validated objects; an unknown or mistyped key is an error that names it.

The file describes one experiment, which makes one table. Its sections, in the order of the pipeline:
``data`` → ``model`` → ``dense`` → ``priors`` → ``learning`` and ``learned`` → ``rows`` (the table).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maskllm4v.errors import ConfigError

PARAMS = Path("params.yaml")

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Pattern = Annotated[str, Field(pattern=r"^\d+:\d+$")]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
# YAML has lists only, so a list may stand for a tuple; its parts are as strict as everything else.
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
FirstLast = Annotated[tuple[Positive, Positive], Field(strict=False)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSettings(Settings):
    """Where the images come from, and how they are split."""

    name: Slug  # of the folder artifacts/data/<name>/
    source: Literal["digits", "folder"]
    root: str | None = None  # folder: holds one folder a split, which hold one folder a class
    train: str = "train"
    test: str = "val"
    hash_files: bool = False  # folder: SHA-256 of every image, not only its size
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5  # digits
    split_seed: int = 0  # digits
    calibration: Count = 128  # images, drawn from the training split
    calibration_seed: int = 0

    @model_validator(mode="after")
    def _root_goes_with_folder(self) -> DataSettings:
        if (self.source == "folder") != (self.root is not None):
            raise ValueError(f"root is needed for source 'folder' and for no other; found source {self.source!r}")
        return self


class ModelSettings(Settings):
    """A timm model by name, or ``VisionTransformer`` built from ``args``."""

    name: str
    args: dict[str, Any] = {}
    exclude: list[str] = ["head"]  # linear layers that stay dense, by name pattern
    on_misfit: Literal["error", "skip"] = "error"
    fused_attention: bool = True  # false: one attention kernel, chosen explicitly


class TaskSettings(Settings):
    """What only the task knows: augmentation and loss."""

    name: Literal["classification"] = "classification"
    label_smoothing: Share = 0.0
    shift: Annotated[int, Field(ge=0)] = 0  # pixels, digits
    shift_probability: Share = 1.0
    eval_batch_size: Count = 256


class DenseSettings(Settings):
    """The dense model: trained here, loaded from a file, or pretrained through timm."""

    row: Slug
    init: Literal["scratch", "checkpoint", "pretrained"]
    checkpoint: str | None = None  # safetensors state dict
    steps: Count = 1000
    batch_size: Count = 64
    lr: Positive = 1e-3
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegative = 0.05
    warmup: Share = 0.1  # share of the steps
    clip_grad: NonNegative = 1.0  # 0: off

    @model_validator(mode="after")
    def _checkpoint_goes_with_init(self) -> DenseSettings:
        if (self.init == "checkpoint") != (self.checkpoint is not None):
            raise ValueError(f"checkpoint is needed for init 'checkpoint' and no other; found init {self.init!r}")
        return self


class PriorSettings(Settings):
    """One one-shot row."""

    method: str
    update_weights: bool = False
    propagate: Literal["dense", "pruned"] | None = None  # None: as the method's authors do
    batch_size: Count = 128


class LearningSettings(Settings):
    """How masks are learned (MaskLLM, arXiv 2409.17481); the defaults of all learned rows."""

    steps: Count = 2000
    batch_size: Count = 128
    lr: Positive = 1e-3
    min_lr: NonNegative = 1e-4
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    clip_grad: NonNegative = 2.0  # 0: off
    tau: FirstLast = (4.0, 0.05)  # at the first step, at the last
    scaling: FirstLast = (10.0, 100.0)
    anneal: Literal["step", "epoch"] = "step"  # how often lr, tau and scaling move
    regularisation: NonNegative = 1e-5  # λ of −λ·Σ(masked weight)²
    init: Literal["prior", "magnitude"] = "prior"
    prior_strength: NonNegative = 3.0
    gate_std: NonNegative = 0.2
    hard: bool = False
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the logits' average; 0: off
    distillation: Share = 0.0  # weight of the dense model's outputs against the labels
    distillation_temperature: Positive = 2.0
    log_every: Count = 10


class LearnedSettings(LearningSettings):
    """One learned row: ``learning`` with this row's own values on top."""

    prior: Slug  # the one-shot row whose masks training starts from


class RuntimeSettings(Settings):
    """What changes no result, and is therefore neither tracked nor recorded."""

    device: str = "auto"
    loader_workers: Annotated[int, Field(ge=0)] = 0
    seed_processes: Annotated[int, Field(ge=0)] = 0  # 0: all seeds at once where that is exact


class Experiment(Settings):
    """One params file."""

    table: Slug
    title: str
    exact: bool = False
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    pattern: Pattern = "2:4"
    data: DataSettings
    task: TaskSettings = TaskSettings()
    model: ModelSettings
    dense: DenseSettings
    priors: dict[Slug, PriorSettings] = {}
    learning: LearningSettings = LearningSettings()
    learned: dict[Slug, LearnedSettings] = {}
    rows: dict[Slug, str]
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="before")
    @classmethod
    def _merge_learning_into_rows(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("learned"), dict):
            return raw
        common = raw.get("learning")
        common = (
            {k: v for k, v in common.items() if k in LearningSettings.model_fields} if isinstance(common, dict) else {}
        )
        rows = {key: {**common, **row} if isinstance(row, dict) else row for key, row in raw["learned"].items()}
        return {**raw, "learned": rows}

    @model_validator(mode="after")
    def _rows_agree(self) -> Experiment:
        made = {self.dense.row, *self.priors, *self.learned}
        if len(made) != 1 + len(self.priors) + len(self.learned):
            raise ValueError("dense.row, priors and learned name the same row twice")
        for row in made ^ set(self.rows):
            if row in made:
                raise ValueError(f"rows: {row!r} is made but not listed there; found {', '.join(self.rows)}")
            raise ValueError(f"rows: {row!r} is listed but made nowhere; made are {', '.join(sorted(made))}")
        for row, settings in self.learned.items():
            if settings.prior not in self.priors:
                raise ValueError(
                    f"learned.{row}.prior is {settings.prior!r}; allowed: {', '.join(self.priors) or '(no priors)'}"
                )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds one twice")
        return self

    def kind(self, row: str) -> Literal["dense", "oneshot", "learned"]:
        """What a row is.

        Raises:
            ConfigError: the table has no such row.
        """
        if row == self.dense.row:
            return "dense"
        if row in self.priors:
            return "oneshot"
        if row in self.learned:
            return "learned"
        raise ConfigError(f"no row {row!r} in this experiment; allowed: {', '.join(self.rows)}")

    def row_settings(self, row: str) -> dict[str, Any]:
        """All settings that a row's result depends on, as plain values."""
        kind = self.kind(row)
        found: dict[str, Any] = {
            "table": self.table,
            "exact": self.exact,
            "seeds": self.seeds,
            "data": self.data,
            "task": self.task,
            "model": self.model,
            "dense": self.dense,
        }
        if kind != "dense":
            found["pattern"] = self.pattern
            found["prior"] = self.priors[row if kind == "oneshot" else self.learned[row].prior]
        if kind == "learned":
            found["learning"] = self.learned[row]
        return {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in found.items()}


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does, and so as DVC does: ``2:4`` is text, ``1e-3`` a number.

    PyYAML follows YAML 1.1, where ``2:4`` is 124 (base 60). `dvc exp run -S` writes it without quotes.
    """


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in ("bool", "int", "float"):  # the first that matches wins
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_SCALARS[_kind][0]})$"), list(_SCALARS[_kind][1])
    )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # 010 is ten


def load_experiment(path: Path = PARAMS) -> Experiment:
    """Read and validate a params file.

    Raises:
        ConfigError: the file is missing, no YAML, or a key is wrong; all faults are listed, a line each.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, an impossible date
        raise ConfigError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    return parse_experiment(raw, str(path))


def parse_experiment(raw: Any, origin: str = "params") -> Experiment:
    """Validate what a params file holds; see :func:`load_experiment`."""
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(fault, raw) for fault in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from error


def _explain(fault: Any, raw: Any) -> str:
    location = tuple(str(part) for part in fault["loc"] if part != "[key]")
    key = ".".join(location)
    if location[:1] == ("learned",) and len(location) > 2:
        own = next(row for name, row in raw["learned"].items() if str(name) == location[1])
        inherited = location[2] in LearningSettings.model_fields and location[2] not in own
        key = ".".join(("learning", *location[2:])) if inherited else key
    if fault["type"] == "extra_forbidden":
        allowed = _allowed_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], allowed, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}; {hint}allowed: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"key {key!r} is missing"
    if fault["type"] == "value_error" and not key:
        return str(fault["ctx"]["error"])
    found = fault["input"]
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}"
    if not key:
        return f"holds {type(raw).__name__}, not a mapping of keys"
    return f"{key} is {found!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _allowed_keys(location: tuple[str, ...]) -> list[str]:
    """The keys of the section at a location such as ``("learned", "<row>")``."""
    section: Any = Experiment
    for part in location:
        is_rows = get_origin(section) is dict
        section = get_args(section)[1] if is_rows else section.model_fields[part].annotation
    return list(section.model_fields)
