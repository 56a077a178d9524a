"""Which sections of ``params.yaml`` a task brings: its folder's ``settings.py``, found by ``task.name``.

That file lies on a higher storey than the one that loads it, which is the one exception to their order: so a new task
is one new folder. It imports no torch, for ``params.yaml`` is read before torch may be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.config.base import Settings
from maskllm4v.config.sections import ModelSettings, NoEvaluation, TaskSettings

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
    """

    task: type[TaskSettings]
    model: type[ModelSettings]
    evaluation: type[Settings] = NoEvaluation
    learning: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Experiment], None] = _nothing


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
