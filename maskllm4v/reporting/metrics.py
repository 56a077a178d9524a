"""What the tasks measure, found by their names, so that nothing behind a record has to know a task."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from maskllm4v.config.metrics import TaskMetrics
from maskllm4v.config.tasks import task_sections
from maskllm4v.utils.errors import ConfigError


def metrics_of(task: str) -> TaskMetrics:
    """Those of a task, by its name.

    Raises:
        ConfigError: its ``settings.py`` says none.
    """
    found = task_sections(task).metrics
    if found is None:
        raise ConfigError(f"maskllm4v/tasks/{task}/settings.py: SECTIONS has no metrics, which tables are made of")
    return found


_AT_TIMESTEP = re.compile(r"(?P<name>\w+)/t(?P<timestep>\d{4})")


def by_timestep(metrics: Mapping[str, float]) -> Iterator[tuple[str, int, float]]:
    """Metrics at one timestep of the noise schedule, ``eps_mse/t0050``, as (name, timestep, value); no others."""
    for key, value in metrics.items():
        if found := _AT_TIMESTEP.fullmatch(key):
            yield found["name"], int(found["timestep"]), value
