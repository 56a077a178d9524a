"""What a row of a table is: one class for each kind, which knows all that follows from its settings.

Whoever asks what a row starts from, which pattern its masks have or what a table calls it asks the row
(:meth:`maskllm4v.config.Experiment.row`); a new kind of row is a new class here, and a stage that makes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from maskllm4v.config.base import Settings
from maskllm4v.config.sections import (
    DenseSettings,
    FinetunedSettings,
    LearnedSettings,
    PriorSettings,
    UpdatedSettings,
)
from maskllm4v.utils.text import plain

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment

Kind = Literal["dense", "oneshot", "learned", "updated", "finetuned"]
Category = Literal["dense", "oneshot", "learned", "updated", "hybrid", "finetuned"]
Stage = Literal["dense", "prior", "train", "update", "finetune"]


@dataclass(frozen=True)
class Row(ABC):
    """A row of an experiment's table.

    Attributes:
        key: its name in the settings, and of its folders.
        experiment: the one whose row it is.
        kind: which class this is, as records say it.
        stage: the stage that makes its weights or masks.
        noun: what messages call such a row.
    """

    key: str
    experiment: Experiment = field(repr=False, compare=False)

    kind: ClassVar[Kind]
    stage: ClassVar[Stage]
    noun: ClassVar[str]

    @property
    @abstractmethod
    def settings(self) -> Settings:
        """Its own settings, those that it shares with others merged in."""

    @property
    def label(self) -> str:
        """What tables call it: its template in ``rows``, such as ``"MaskLLM-4V ({steps} steps)"``, filled in.

        Names in braces are the row's own settings, merged with those that it shares, and ``pattern``; Python's format
        specifications are allowed (``{steps:,}``), and a brace itself is doubled.

        Raises:
            ValueError: the template names something else, or a setting that the row has not.
        """
        template = self.experiment.rows[self.key]
        settings = {**dict(self.settings), "pattern": self.pattern}
        known = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
        try:
            named = {name: spec or "" for _, name, spec, _ in Formatter().parse(template) if name is not None}
            if unknown := [name for name in named if name not in known]:
                raise ValueError(f"it names {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
            if any("{" in spec for spec in named.values()):
                raise ValueError("a format specification holds braces")
            return plain(template.format_map(known))
        except ValueError as error:
            raise ValueError(f"rows.{self.key} is {template!r}: {error}") from None

    @property
    def category(self) -> Category:
        """What it counts as in tables and charts: its kind, but for learned and updated rows that mix two."""
        return self.kind

    @property
    def source(self) -> Row | None:
        """The row that its masks come or start from; None for dense weights and where masks begin."""
        return None

    @property
    def start(self) -> str | None:
        """The key of the row that it is made from, where its settings name one."""
        return None if self.source is None else self.source.key

    @property
    def chain(self) -> list[Row]:
        """The row itself and those that its masks came through, the last one first."""
        found: list[Row] = [self]
        while (source := found[-1].source) is not None:
            found.append(source)
        return found

    @property
    def oneshot(self) -> OneShotRow | None:
        """The one-shot row at which the way of its masks begins; None for dense weights."""
        first = self.chain[-1]
        return first if isinstance(first, OneShotRow) else None

    @property
    def pattern(self) -> str | None:
        """The N:M pattern of its masks; None for dense weights."""
        first = self.oneshot
        return None if first is None else first.settings.pattern or self.experiment.pattern

    @property
    def gate(self) -> str | None:
        """What the logits stood for that its masks were last learned with; None where nothing was learned."""
        return next((row.settings.gate for row in self.chain if isinstance(row, LearnedRow)), None)

    @property
    def updates_weights(self) -> bool:
        """Whether it has other weights than the dense model."""
        return False

    @property
    @abstractmethod
    def method(self) -> str:
        """What made its masks or weights, whichever came last."""

    @property
    def seeds(self) -> list[int]:
        """The seeds that it has results of."""
        return self.experiment.seeds

    @abstractmethod
    def step_settings(self) -> dict[str, Any]:
        """Settings of what is done after the dense model: for this row itself, and for the row that it starts from."""

    def made_with(self, *, defaults: bool = True) -> dict[str, Any]:
        """All settings that it is made with, as plain values; without ``defaults``, only those that differ."""
        return _plain(self._sections(), defaults)

    def record_settings(self, *, defaults: bool = False) -> dict[str, Any]:
        """What its metrics depend on: the settings that it is made with, and those that it is measured with.

        As records hold them, which is without settings at their defaults: table, ``exact``, seeds, pattern, every
        section, and in it what must be given or differs (:meth:`~maskllm4v.config.base.Settings.beyond_defaults`).
        A new setting with a default so changes no record. A default that is changed would change what existing records
        say. It takes a new format of records, with a step of ``scripts/migrate_records.py`` that writes the old value
        into those that do not hold one.

        Args:
            defaults: all settings instead, to be shown.
        """
        return _plain(self._sections() | self.experiment.measured_with(), defaults)

    def _sections(self) -> dict[str, Any]:
        experiment = self.experiment
        found: dict[str, Any] = {
            "table": experiment.table,
            "exact": experiment.exact,
            "seeds": experiment.seeds,
            "data": experiment.data,
            "task": experiment.task,
            "model": experiment.model,
            "dense": experiment.dense,
        }
        if pattern := self.pattern:
            found["pattern"] = pattern
        return found | self.step_settings()


@dataclass(frozen=True)
class DenseRow(Row):
    """The dense model."""

    kind: ClassVar[Kind] = "dense"
    stage: ClassVar[Stage] = "dense"
    noun: ClassVar[str] = "dense"

    @property
    def settings(self) -> DenseSettings:
        return self.experiment.dense

    @property
    def method(self) -> str:
        return "dense"

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(map(self.experiment.dense_seed, self.experiment.seeds)))

    def step_settings(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class OneShotRow(Row):
    """Masks by a one-shot method, and weights if the method updates them."""

    kind: ClassVar[Kind] = "oneshot"
    stage: ClassVar[Stage] = "prior"
    noun: ClassVar[str] = "one-shot"

    @property
    def settings(self) -> PriorSettings:
        return self.experiment.priors[self.key]

    @property
    def updates_weights(self) -> bool:
        return self.settings.update_weights

    @property
    def method(self) -> str:
        return self.settings.method

    def step_settings(self) -> dict[str, Any]:
        return {"prior": self.settings}


class _FromMasks(Row):
    """A row that starts from another one's masks."""

    def step_settings(self) -> dict[str, Any]:
        source = self.source
        if source is None:
            return {}
        return source.step_settings() if isinstance(source, OneShotRow) else {"start": source.step_settings()}


@dataclass(frozen=True)
class LearnedRow(_FromMasks):
    """Masks learned from a prior, on frozen weights."""

    kind: ClassVar[Kind] = "learned"
    stage: ClassVar[Stage] = "train"
    noun: ClassVar[str] = "learned"

    @property
    def settings(self) -> LearnedSettings:
        return self.experiment.learned[self.key]

    @property
    def source(self) -> Row:
        return self.experiment.row(self.settings.prior)

    @property
    def category(self) -> Category:
        """A hybrid where the frozen weights are not the dense model's: never counted among those."""
        return "hybrid" if self.updates_weights else "learned"

    @property
    def updates_weights(self) -> bool:
        return self.settings.weights == "updated"

    @property
    def method(self) -> str:
        return "maskllm"

    def step_settings(self) -> dict[str, Any]:
        return {**super().step_settings(), "learning": self.settings}


@dataclass(frozen=True)
class UpdatedRow(_FromMasks):
    """Another row's masks, and weights corrected for what they prune."""

    kind: ClassVar[Kind] = "updated"
    stage: ClassVar[Stage] = "update"
    noun: ClassVar[str] = "updated"

    @property
    def settings(self) -> UpdatedSettings:
        return self.experiment.updated[self.key]

    @property
    def source(self) -> Row:
        return self.experiment.row(self.settings.masks)

    @property
    def category(self) -> Category:
        """Another row's masks on dense weights count as masks of that row's kind, wherever they were learned."""
        return "updated" if self.updates_weights else self.source.kind

    @property
    def updates_weights(self) -> bool:
        return self.settings.update != "none"

    @property
    def method(self) -> str:
        return self.settings.update if self.updates_weights else self.source.method

    def step_settings(self) -> dict[str, Any]:
        return {**super().step_settings(), "update": self.settings}


@dataclass(frozen=True)
class FinetunedRow(_FromMasks):
    """A control: weights trained on, dense or under a fixed mask."""

    kind: ClassVar[Kind] = "finetuned"
    stage: ClassVar[Stage] = "finetune"
    noun: ClassVar[str] = "fine-tuned"

    @property
    def settings(self) -> FinetunedSettings:
        return self.experiment.finetuned[self.key]

    @property
    def source(self) -> Row | None:
        start = self.experiment.row(self.settings.start)
        return None if isinstance(start, DenseRow) else start

    @property
    def start(self) -> str:
        return self.settings.start

    @property
    def updates_weights(self) -> bool:
        return True

    @property
    def method(self) -> str:
        return "finetune"

    def step_settings(self) -> dict[str, Any]:
        return {**super().step_settings(), "finetuning": self.settings}


def _plain(value: Any, defaults: bool) -> Any:
    """Settings, in mappings of mappings, as plain values, with those at their defaults or without."""
    if isinstance(value, Settings):
        return value.model_dump(mode="json") if defaults else value.beyond_defaults()
    return {key: _plain(inner, defaults) for key, inner in value.items()} if isinstance(value, dict) else value
