"""One params file: an experiment, which makes one table."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, create_model, model_validator

from maskllm4v.config.base import Line, Pattern, Settings, Slug
from maskllm4v.config.rows import DenseRow, FinetunedRow, LearnedRow, OneShotRow, Row, UpdatedRow
from maskllm4v.config.sections import (
    DataSettings,
    DenseSettings,
    ExportSettings,
    FinetunedSettings,
    LearnedSettings,
    LearningSettings,
    ModelSettings,
    NoEvaluation,
    PriorSettings,
    RuntimeSettings,
    TaskSettings,
    UpdatedSettings,
)
from maskllm4v.config.starts import check_patterns, check_starts
from maskllm4v.config.taken import check_names
from maskllm4v.config.tasks import TaskSpec, task_name, task_names, task_sections
from maskllm4v.utils.errors import ConfigError

SomeRow = TypeVar("SomeRow", bound=Row)


class Experiment(Settings):
    """One params file; its task says what ``task``, ``model`` and ``evaluation`` hold (:func:`experiment_class`)."""

    table: Slug
    title: Line
    exact: bool = False
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    pattern: Pattern = "2:4"
    data: DataSettings
    task: TaskSettings
    model: ModelSettings
    dense: DenseSettings
    priors: dict[Slug, PriorSettings] = {}
    learning: LearningSettings = LearningSettings()
    learned: dict[Slug, LearnedSettings] = {}
    updated: dict[Slug, UpdatedSettings] = {}
    finetuned: dict[Slug, FinetunedSettings] = {}
    rows: dict[Slug, Line]
    evaluation: Settings = NoEvaluation()
    exports: dict[Slug, ExportSettings] = {}
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_task(cls, raw: Any, validate: Callable[[Any], Experiment]) -> Experiment:
        """An experiment is one of its task's class, whoever makes it."""
        if cls is Experiment and not isinstance(raw, Experiment) and task_name(raw) in task_names():
            return experiment_class(task_name(raw)).model_validate(raw)
        return validate(raw)

    def __reduce__(self) -> tuple[Any, ...]:  # a class that was made cannot be found by its name
        return Experiment.model_validate, (self.model_dump(exclude_unset=True),)

    @model_validator(mode="before")
    @classmethod
    def _merge_learning_into_rows(cls, raw: Any) -> Any:
        """``learning`` holds what trained rows share; a row's own keys go before it."""
        if not isinstance(raw, dict):
            return raw
        common = raw.get("learning")
        if defaults := task_sections(task_name(raw)).learning:
            common = {**defaults, **common} if isinstance(common, dict) else (defaults if common is None else common)
        merged = {}
        for section, settings in (("learned", LearnedSettings), ("finetuned", FinetunedSettings)):
            if isinstance(raw.get(section), dict) and isinstance(common, dict):
                known = {k: v for k, v in common.items() if k in settings.model_fields}
                merged[section] = {key: _merged(known, row) for key, row in raw[section].items()}
        return {**raw, **merged, **({} if common is None else {"learning": common})}

    @model_validator(mode="after")
    def _rows_agree(self) -> Experiment:
        check_names(self.table, self.rows)
        listed = [self.dense.row, *self.priors, *self.learned, *self.updated, *self.finetuned]
        made = set(listed)
        if len(made) != len(listed):
            raise ValueError("dense.row, priors, learned, updated and finetuned name the same row twice")
        for row in made ^ set(self.rows):
            if row in made:
                raise ValueError(f"rows: {row!r} is made but not listed there; found {', '.join(self.rows)}")
            raise ValueError(f"rows: {row!r} is listed but made nowhere; made are {', '.join(sorted(made))}")
        for row, finetuned in self.finetuned.items():
            if finetuned.start != self.dense.row and finetuned.start not in self.priors:
                allowed = ", ".join((self.dense.row, *self.priors))
                raise ValueError(f"finetuned.{row}.start is {finetuned.start!r}; allowed: {allowed}")
        check_starts(self)
        check_patterns(self)
        for row, learned in self.learned.items():
            if learned.select == "best" and not self.data.holdout:
                raise ValueError(f"learned.{row}.select is 'best', which needs data.holdout; never the reported split")
        for section, rows in (("learned", self.learned), ("finetuned", self.finetuned)):
            for row, training in rows.items():
                if training.steps is None and training.epochs is None:
                    raise ValueError(f"{section}.{row} needs steps or epochs, there or in learning")
        for row, export in self.exports.items():
            if row not in self.rows:
                raise ValueError(f"exports: {row!r} is no row; allowed: {', '.join(self.rows)}")
            if self.row(row).pattern is None and (sparse := {"packed", "mask"} & set(export.formats)):
                raise ValueError(f"exports.{row}.formats holds {min(sparse)!r}, but the row is dense")
            if "mask" in export.formats and self.row(row).updates_weights:
                raise ValueError(f"exports.{row}.formats holds 'mask', but the row's weights are updated, too")
        if self.task.eval_split == "holdout" and not self.data.holdout:
            raise ValueError("task.eval_split is 'holdout', which needs data.holdout")
        task_sections(self.task.name).check(self)
        if self.exact and self.runtime.processes > 1:
            raise ValueError(f"runtime.processes is {self.runtime.processes}, but exact: true needs one process")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds one twice")
        for made_row in self.all_rows:
            _ = made_row.label  # a template that names what the row has not
        return self

    def row(self, key: str) -> Row:
        """The row of that name.

        Raises:
            ConfigError: the table has none.
        """
        if key == self.dense.row:
            return DenseRow(key, self)
        sections: dict[type[Row], Container[str]] = {
            OneShotRow: self.priors,
            LearnedRow: self.learned,
            UpdatedRow: self.updated,
            FinetunedRow: self.finetuned,
        }
        for kind, section in sections.items():
            if key in section:
                return kind(key, self)
        raise ConfigError(f"no row {key!r} in this experiment; allowed: {', '.join(self.rows)}")

    def row_of(self, kind: type[SomeRow], key: str) -> SomeRow:
        """The row of that name, which has to be of a kind.

        Raises:
            ConfigError: the table has none, or it is of another kind.
        """
        row = self.row(key)
        if not isinstance(row, kind):
            allowed = ", ".join(one.key for one in self.all_rows if isinstance(one, kind)) or "(none)"
            article = "an" if kind.noun[0] in "aeiou" else "a"
            raise ConfigError(f"{key!r} is not {article} {kind.noun} row; allowed: {allowed}")
        return row

    @property
    def all_rows(self) -> list[Row]:
        """All rows, in the table's order."""
        return [self.row(key) for key in self.rows]

    def dense_seed(self, seed: int) -> int:
        """Which seed's dense model a seed uses."""
        return self.seeds[0] if self.dense.shared or self.dense.init != "scratch" else seed

    def task_spec(self, judge: Path | None = None) -> TaskSpec:
        """What the table's task is made of; ``judge``: see :class:`~maskllm4v.config.tasks.TaskSpec`."""
        return TaskSpec(self.task, self.model, self.evaluation, self.data, self.seeds, self.runtime, judge)

    def measured_with(self) -> dict[str, Settings]:
        """Sections that metrics depend on beyond those that rows are made with."""
        return {} if isinstance(self.evaluation, NoEvaluation) else {"evaluation": self.evaluation}


@cache
def experiment_class(task: str) -> type[Experiment]:
    """:class:`Experiment` with the sections of one of :func:`~maskllm4v.config.tasks.task_names`."""
    sections = task_sections(task)
    return create_model(
        Experiment.__name__,
        __base__=Experiment,
        __doc__=Experiment.__doc__,
        __module__=__name__,
        task=(sections.task, sections.task()),  # type: ignore[call-arg]  # its name is its default
        model=(sections.model, ...),
        evaluation=(sections.evaluation, sections.evaluation()),
    )


def _merged(common: dict[str, Any], row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    if "steps" in row or "epochs" in row:  # a row's budget goes before the common one, whatever its unit
        common = {k: v for k, v in common.items() if k not in ("steps", "epochs")}
    return {**common, **row}
