"""One params file: an experiment, which makes one table."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from maskllm4v.config.diffusion import (
    DiffusionSettings,
    DiTSettings,
    EvaluationSettings,
    check_diffusion,
    default_learning,
)
from maskllm4v.config.sections import (
    DataSettings,
    DenseSettings,
    ExportSettings,
    FinetunedSettings,
    LearnedSettings,
    LearningSettings,
    ModelSettings,
    Pattern,
    PriorSettings,
    RuntimeSettings,
    Settings,
    Slug,
    TaskSettings,
    UpdatedSettings,
)
from maskllm4v.config.starts import check_patterns, check_starts
from maskllm4v.errors import ConfigError

Kind = Literal["dense", "oneshot", "learned", "updated", "finetuned"]


def _name_of(section: Any, default: str = "") -> str:
    name = section.get("name") if isinstance(section, dict) else getattr(section, "name", None)
    return name if isinstance(name, str) else default


AnyTask = Annotated[
    Annotated[TaskSettings, Tag("classification")] | Annotated[DiffusionSettings, Tag("diffusion")],
    Discriminator(lambda task: "diffusion" if _name_of(task) == "diffusion" else "classification"),
]
AnyModel = Annotated[
    Annotated[ModelSettings, Tag("timm")] | Annotated[DiTSettings, Tag("DiT")],
    Discriminator(lambda model: "DiT" if _name_of(model) == "DiTTransformer2DModel" else "timm"),
]


class Experiment(Settings):
    """One params file."""

    table: Slug
    title: str
    exact: bool = False
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    pattern: Pattern = "2:4"
    data: DataSettings
    task: AnyTask = TaskSettings()
    model: AnyModel
    dense: DenseSettings
    priors: dict[Slug, PriorSettings] = {}
    learning: LearningSettings = LearningSettings()
    learned: dict[Slug, LearnedSettings] = {}
    updated: dict[Slug, UpdatedSettings] = {}
    finetuned: dict[Slug, FinetunedSettings] = {}
    rows: dict[Slug, str]
    evaluation: EvaluationSettings = EvaluationSettings()  # diffusion; what classification has of it stands in task
    exports: dict[Slug, ExportSettings] = {}
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="before")
    @classmethod
    def _merge_learning_into_rows(cls, raw: Any) -> Any:
        """``learning`` holds what trained rows share; a row's own keys go before it."""
        if not isinstance(raw, dict):
            return raw
        common = raw.get("learning")
        if defaults := default_learning(raw.get("task")):
            common = {**defaults, **common} if isinstance(common, dict) else (common or defaults)
        merged = {}
        for section, settings in (("learned", LearnedSettings), ("finetuned", FinetunedSettings)):
            if isinstance(raw.get(section), dict) and isinstance(common, dict):
                known = {k: v for k, v in common.items() if k in settings.model_fields}
                merged[section] = {key: _merged(known, row) for key, row in raw[section].items()}
        return {**raw, **merged, **({} if common is None else {"learning": common})}

    @model_validator(mode="after")
    def _rows_agree(self) -> Experiment:
        listed = [self.dense.row, *self.priors, *self.learned, *self.updated, *self.finetuned]
        made = set(listed)
        if len(made) != len(listed):
            raise ValueError("dense.row, priors, learned, updated and finetuned name the same row twice")
        for row in made ^ set(self.rows):
            if row in made:
                raise ValueError(f"rows: {row!r} is made but not listed there; found {', '.join(self.rows)}")
            raise ValueError(f"rows: {row!r} is listed but made nowhere; made are {', '.join(sorted(made))}")
        check_starts(self)
        check_patterns(self)
        for row, learned in self.learned.items():
            if learned.select == "best" and not self.data.holdout:
                raise ValueError(f"learned.{row}.select is 'best', which needs data.holdout; never the reported split")
        for row, finetuned in self.finetuned.items():
            if finetuned.start != self.dense.row and finetuned.start not in self.priors:
                allowed = ", ".join((self.dense.row, *self.priors))
                raise ValueError(f"finetuned.{row}.start is {finetuned.start!r}; allowed: {allowed}")
        for section, rows in (("learned", self.learned), ("finetuned", self.finetuned)):
            for row, training in rows.items():
                if training.steps is None and training.epochs is None:
                    raise ValueError(f"{section}.{row} needs steps or epochs, there or in learning")
        for row, export in self.exports.items():
            if row not in self.rows:
                raise ValueError(f"exports: {row!r} is no row; allowed: {', '.join(self.rows)}")
            if self.mask_row(row) is None and (sparse := {"packed", "mask"} & set(export.formats)):
                raise ValueError(f"exports.{row}.formats holds {min(sparse)!r}, but the row is dense")
            if "mask" in export.formats and self.updates_weights(row):
                raise ValueError(f"exports.{row}.formats holds 'mask', but the row's weights are updated, too")
        if self.task.eval_split == "holdout" and not self.data.holdout:
            raise ValueError("task.eval_split is 'holdout', which needs data.holdout")
        self._task_and_model_agree()
        if self.exact and self.runtime.processes > 1:
            raise ValueError(f"runtime.processes is {self.runtime.processes}, but exact: true needs one process")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds one twice")
        return self

    def _task_and_model_agree(self) -> None:
        diffusion = isinstance(self.task, DiffusionSettings)
        if diffusion != isinstance(self.model, DiTSettings):
            allowed = "DiTTransformer2DModel" if diffusion else "a timm model"
            raise ValueError(f"model.name is {self.model.name!r}; allowed for task {self.task.name!r}: {allowed}")
        if isinstance(self.task, DiffusionSettings) and isinstance(self.model, DiTSettings):
            check_diffusion(self, self.task, self.model)
            return
        default = EvaluationSettings()
        if changed := [key for key, value in self.evaluation if value != getattr(default, key)]:
            raise ValueError(f"evaluation.{changed[0]} is for task 'diffusion' only")
        made_from: tuple[dict[str, Any], ...] = (self.priors, self.learned, self.updated)
        inputs = {row: made.inputs for rows in made_from for row, made in rows.items()}
        if generated := [row for row, kind in inputs.items() if kind != "data"]:
            raise ValueError(f"{generated[0]}: inputs is 'generated', which task 'classification' cannot make")

    @property
    def judge(self) -> Experiment | None:
        """The classifier that judges samples, as an experiment of its own on the same data, with one dense row."""
        judge = self.task.judge if isinstance(self.task, DiffusionSettings) else None
        if judge is None:
            return None
        return Experiment(
            table=self.table,
            title="Judge",
            exact=self.exact,
            seeds=self.seeds[:1],
            data=self.data,
            task=judge.task,
            model=judge.model,
            dense=DenseSettings(row="judge", init="scratch", **dict(judge.training)),
            rows={"judge": "Judge"},
            runtime=self.runtime,
        )

    def kind(self, row: str) -> Kind:
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
        if row in self.updated:
            return "updated"
        if row in self.finetuned:
            return "finetuned"
        raise ConfigError(f"no row {row!r} in this experiment; allowed: {', '.join(self.rows)}")

    def mask_row(self, row: str) -> str | None:
        """The row that a row's masks come or start from, a one-shot row being its own; None for dense weights."""
        if self.kind(row) == "learned":
            return self.learned[row].prior
        if row in self.updated:
            return self.updated[row].masks
        start = self.finetuned[row].start if row in self.finetuned else row
        return start if start in self.priors else None

    def chain(self, row: str) -> list[str]:
        """A row and those that its masks came through, the last one first."""
        found = [row]
        while (start := self.mask_row(found[-1])) is not None and start != found[-1]:
            found.append(start)
        return found

    def oneshot_row(self, row: str) -> str | None:
        """The one-shot row at which the way of a row's masks begins; None for dense weights."""
        first = self.chain(row)[-1]
        return first if first in self.priors else None

    def pattern_of(self, row: str) -> str | None:
        """The N:M pattern of a row; None for dense weights."""
        start = self.oneshot_row(row)
        return None if start is None else self.priors[start].pattern or self.pattern

    def updates_weights(self, row: str) -> bool:
        """Whether a row has other weights than the dense model."""
        kind = self.kind(row)
        if kind == "learned":
            return self.learned[row].weights == "updated"
        if kind == "updated":
            return self.updated[row].update != "none"
        return kind == "finetuned" or (kind == "oneshot" and self.priors[row].update_weights)

    def dense_seed(self, seed: int) -> int:
        """Which seed's dense model a seed uses."""
        return self.seeds[0] if self.dense.shared or self.dense.init != "scratch" else seed

    def row_seeds(self, row: str) -> list[int]:
        """The seeds that a row has results of."""
        return list(dict.fromkeys(map(self.dense_seed, self.seeds))) if self.kind(row) == "dense" else self.seeds

    def calibration_set(self, seed: int) -> int:
        """Which calibration set a seed uses."""
        return self.seeds.index(seed) % self.data.calibration_sets

    def row_settings(self, row: str, *, defaults: bool = True) -> dict[str, Any]:
        """All settings that a row is made with, as plain values; without ``defaults``, only those that differ."""
        return _plain(self._made_with(row), defaults)

    def record_settings(self, row: str, *, defaults: bool = False) -> dict[str, Any]:
        """What a row's metrics depend on: the settings that it is made with, and those that it is measured with.

        As records hold them, which is without settings at their defaults: table, ``exact``, seeds, pattern, every
        section, and in it what must be given or differs (:meth:`~maskllm4v.config.sections.Settings.beyond_defaults`).
        A new setting with a default so changes no record. A default that is changed would change what existing records
        say. It takes a new format of records, with a step of ``scripts/migrate_records.py`` that writes the old value
        into those that do not hold one.

        Args:
            row: its key.
            defaults: all settings instead, to be shown.
        """
        found = self._made_with(row)
        if isinstance(self.task, DiffusionSettings):
            found["evaluation"] = self.evaluation
        return _plain(found, defaults)

    def _made_with(self, row: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "table": self.table,
            "exact": self.exact,
            "seeds": self.seeds,
            "data": self.data,
            "task": self.task,
            "model": self.model,
            "dense": self.dense,
        }
        if pattern := self.pattern_of(row):
            found["pattern"] = pattern
        return found | self._steps(row)

    def _steps(self, row: str) -> dict[str, Any]:
        """Settings of what is done after the dense model: of a row itself, and of the row that it starts from."""
        kind, start = self.kind(row), self.mask_row(row)
        found: dict[str, Any] = {}
        if start in self.priors:
            found["prior"] = self.priors[start]
        elif start is not None:
            found["start"] = self._steps(start)
        if kind == "learned":
            found["learning"] = self.learned[row]
        if kind == "updated":
            found["update"] = self.updated[row]
        if kind == "finetuned":
            found["finetuning"] = self.finetuned[row]
        return found


def _plain(value: Any, defaults: bool) -> Any:
    """Settings, in mappings of mappings, as plain values, with those at their defaults or without."""
    if isinstance(value, Settings):
        return value.model_dump(mode="json") if defaults else value.beyond_defaults()
    return {key: _plain(inner, defaults) for key, inner in value.items()} if isinstance(value, dict) else value


def _merged(common: dict[str, Any], row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    if "steps" in row or "epochs" in row:  # a row's budget goes before the common one, whatever its unit
        common = {k: v for k, v in common.items() if k not in ("steps", "epochs")}
    return {**common, **row}
