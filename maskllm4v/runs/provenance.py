"""How a row's artifacts were made, written beside them: settings, hardware, number of processes."""

from __future__ import annotations

import platform
from typing import Any

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import origin_file
from maskllm4v.utils.devices import hardware, pick_device
from maskllm4v.utils.errors import CheckpointError
from maskllm4v.utils.io import read_json, write_json
from maskllm4v.utils.processes import is_main, world_size

PINNED = "x86-64 CPU, pinned kernels, one thread"  # of an exact run: the CPU's name would make records differ


def where(experiment: Experiment) -> dict[str, Any]:
    """Hardware and number of processes of this run; of an exact one what it was held to (see :data:`PINNED`)."""
    device = pick_device(experiment.runtime.device)
    pinned = experiment.exact and device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return {"hardware": PINNED if pinned else hardware(device), "world_size": world_size()}


def write_origin(experiment: Experiment, row: str) -> None:
    """Say how a row's artifacts were made."""
    if is_main():
        write_json(origin_file(row), {"settings": experiment.row(row).made_with(), **where(experiment)})


def read_origin(experiment: Experiment, row: str) -> dict[str, Any]:
    """Hardware and number of processes that a row was made with.

    Raises:
        CheckpointError: it was made with other settings.
    """
    found = read_json(origin_file(row))
    if not isinstance(found, dict) or not _fits(experiment, row, found.get("settings")):
        raise CheckpointError(f"{origin_file(row)}: these artifacts were made with other settings; make them again")
    return {"hardware": found["hardware"], "world_size": found["world_size"]}


def _fits(experiment: Experiment, row: str, found: Any) -> bool:
    """Whether settings as they were written down are those of a row, whatever its table is called now.

    Those at their defaults may be missing: artifacts are older than settings that have come since.
    """
    least, most = (_but_table(experiment.row(row).made_with(defaults=defaults)) for defaults in (False, True))
    return isinstance(found, dict) and _within(least, found) and _within(_but_table(found), most)


def _within(part: Any, whole: Any) -> bool:
    """Whether one holds nothing that the other does not, with the same value."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and _within(value, whole[key]) for key, value in part.items())
    return bool(part == whole)


def _but_table(settings: dict[str, Any]) -> dict[str, Any]:
    """A table may be renamed without making its rows again."""
    return {key: value for key, value in settings.items() if key != "table"}
