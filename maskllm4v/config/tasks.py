"""What a task is made of, and which sections of ``params.yaml`` are its own.

The sections stand in its folder's ``settings.py``, found by ``task.name``, so that a new task is a new folder. That
file lies on a higher storey than this one, the one exception to their order. It imports no torch, for ``params.yaml``
is read before torch may be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.config.base import Settings
from maskllm4v.config.metrics import TaskMetrics
from maskllm4v.config.sections import DataSettings, ModelSettings, NoEvaluation, RuntimeSettings, TaskSettings

if TYPE_CHECKING:
    from maskllm4v.config.experiment import Experiment

FOLDER = Path(__file__).parent.parent / "tasks"
DEFAULT = "classification"  # where ``task`` names none


def _nothing(_: Experiment) -> None:
    """For tasks whose settings go together whatever they are."""


@dataclass(frozen=True)
class TaskSections:
    """The sections that are a task's own; its ``settings.py`` calls them ``SECTIONS``.

    Attributes:
        task, model, evaluation: their classes; the first one's defaults are a whole section.
        learning: what ``learning`` holds unless it says otherwise.
        check: raises ``ValueError`` where the settings of an experiment with this task do not go together.
        metrics: what is measured, for tables to show; None: its models are trained and evaluated, but no table is made.
    """

    task: type[TaskSettings]
    model: type[ModelSettings]
    evaluation: type[Settings] = NoEvaluation
    learning: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Experiment], None] = _nothing
    metrics: TaskMetrics | None = None


@dataclass(frozen=True)
class TaskSpec:
    """What a task is made of: :func:`maskllm4v.tasks.base.open_task`.

    Attributes:
        task, model, evaluation: the sections of that name.
        data: the images; None: there are none, and models are but built, loaded and exported, or sampled from.
        seeds: that the calibration sets go to in turn.
        runtime: device and loader workers.
        judge: weights of the classifier that judges samples; needed where samples are evaluated.
    """

    task: TaskSettings
    model: ModelSettings
    evaluation: Settings = field(default_factory=NoEvaluation)
    data: DataSettings | None = None
    seeds: Sequence[int] = (0,)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    judge: Path | None = None

    def calibration_set(self, seed: int) -> int:
        """Which calibration set a seed uses; there have to be data."""
        assert self.data is not None
        return self.seeds.index(seed) % self.data.calibration_sets


def task_names() -> list[str]:
    """All tasks that there are."""
    return sorted(path.parent.name for path in FOLDER.glob("*/settings.py"))


def task_sections(name: str) -> TaskSections:
    """The sections of one of :func:`task_names`."""
    found: TaskSections = import_module(f"maskllm4v.tasks.{name}.settings").SECTIONS
    return found


def task_name(raw: Any) -> Any:
    """The task that a params file names, whatever that is."""
    task = raw.get("task") if isinstance(raw, dict) else None
    return task.get("name", DEFAULT) if isinstance(task, dict) else DEFAULT
