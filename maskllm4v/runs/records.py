"""One JSON record a row: what was measured, of what, with which settings, from which inputs.

Records are committed and hashed, so they hold no dates and no timings, and their numbers are rounded.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import file_digest, read_json, value_digest, write_json

if TYPE_CHECKING:
    from maskllm4v.config import Experiment

FORMAT = 4  # scripts/migrate_records.py has a step from each one to the next
MIGRATE = "python -m scripts.migrate_records"
DIGITS = 6
PACKAGES = ("accelerate", "numpy", "scikit-learn", "timm", "torch", "torchvision")
TASK_PACKAGES = {
    "detection": ("pycocotools",),
    "diffusion": ("diffusers", "torchmetrics"),
}  # those that one task alone needs
REQUIRED = (
    "format",
    "row",
    "table",
    "kind",
    "exact",
    "made",
    "evaluated",
    "metrics",
    "seeds",
    "settings",
    "settings_digest",
    "inputs",
    "versions",
)
KINDS = {"row": str, "kind": str, "made": dict, "evaluated": dict, "metrics": dict, "seeds": list}
KINDS |= {"settings": dict, "inputs": dict, "versions": dict}


def build_record(
    *,
    row: str,
    kind: str,
    settings: Mapping[str, Any],
    metrics: Mapping[int, Mapping[str, float]],
    summaries: Mapping[int, Mapping[str, Any]],
    inputs: Mapping[str, Any],
    parameters: Mapping[str, int],
    made: Mapping[str, Any],
    evaluated: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a record together.

    Args:
        row: its key.
        kind: ``"dense"``, ``"oneshot"``, ``"learned"``, ``"updated"`` or ``"finetuned"``.
        settings: everything the result depends on, see :meth:`maskllm4v.config.Row.record_settings`.
        metrics: by seed, then by name.
        summaries: by seed: the original's JSON object; empty for tasks that the original has not.
        inputs: digests of what was evaluated.
        parameters: counts: of the dense model, kept after pruning, of logits.
        made, evaluated: hardware and number of processes (for exact runs what they were held to).
    """
    return {
        "format": FORMAT,
        "row": row,
        "table": settings["table"],
        "kind": kind,
        "exact": settings["exact"],
        "made": dict(made),
        "evaluated": dict(evaluated),
        "seeds": list(metrics),
        "metrics": {str(seed): {k: round(v, DIGITS) for k, v in values.items()} for seed, values in metrics.items()},
        "summaries": {str(seed): dict(summary) for seed, summary in summaries.items()},
        "parameters": dict(parameters),
        "settings": dict(settings),
        "settings_digest": value_digest(settings),
        "inputs": dict(inputs),
        "versions": versions(settings["task"]["name"]),
    }


def settings_digest(experiment: Experiment, row: str) -> str:
    """SHA-256 of what a row's record holds of the settings, in hex; no setting at its default has a part in it.

    A record belongs to the experiment as it is now if, and only if, it has this digest.
    """
    return value_digest(experiment.row(row).record_settings())


def versions(task: str = "classification") -> dict[str, str]:
    """Releases that a task's result may depend on; Python's without the patch level, which changes no number."""
    packages = sorted((*PACKAGES, *TASK_PACKAGES.get(task, ())))
    found = {name: metadata.version(name) for name in packages}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **found}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of all else in it, by which a damaged one is told."""
    content = {key: value for key, value in record.items() if key != "digest"}
    return {**content, "digest": value_digest(content)}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, :func:`sealed`."""
    write_json(path, sealed(record))


def read_record(path: Path) -> dict[str, Any]:
    """A record as its file holds it: without settings at their defaults.

    Raises:
        UserError: the file is missing, no record, edited, or of another format; of an older one, how to migrate it.
    """
    record = read_json(path)
    missing = [key for key in REQUIRED if not isinstance(record, dict) or key not in record]
    if missing:
        raise UserError(f"{path} is no record: {', '.join(missing)} missing")
    if record["format"] != FORMAT:
        older = type(record["format"]) is int and record["format"] < FORMAT
        how = f"; `{MIGRATE}` brings older records up to date" if older else ""
        raise UserError(f"{path} has format {record['format']}; this version reads {FORMAT}{how}")
    if not isinstance(record["settings"], dict) or value_digest(record["settings"]) != record["settings_digest"]:
        raise UserError(f"{path}: settings and their digest disagree; the record was edited")
    if fault := _fault(record):
        raise UserError(f"{path} is damaged: {fault}")
    if sealed(record)["digest"] != record.get("digest"):
        raise UserError(f"{path}: content and digest disagree; the record was edited, or is damaged")
    return dict(record)


def _fault(record: Mapping[str, Any]) -> str:
    """What a record cannot have been written with, in words; empty if nothing is."""
    for key, kind in KINDS.items():
        if not isinstance(record[key], kind):
            return f"{key} is {record[key]!r}, not a {kind.__name__}"
    for key in ("made", "evaluated"):
        if not (isinstance(record[key].get("hardware"), str) and type(record[key].get("world_size")) is int):
            return f"{key} has to say hardware and world_size"
    metrics = record["metrics"]
    if sorted(map(str, record["seeds"])) != sorted(metrics):
        return f"seeds are {record['seeds']}, metrics those of {', '.join(metrics) or 'none'}"
    for seed, values in metrics.items():
        if not isinstance(values, dict) or values.keys() != next(iter(metrics.values())).keys():
            return f"metrics of seed {seed} are others than those of the first seed"
        for name, value in values.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                return f"{name} of seed {seed} is {value!r}, not a finite number"
    return ""


def read_records(reports: Path, table: str) -> dict[str, dict[str, Any]]:
    """All records of a table by row; rows without one are simply absent.

    Raises:
        UserError: as :func:`read_record`, or a record lies in another row's folder.
    """
    found = {}
    for path in sorted((reports / table / "runs").glob("*/evaluation/record.json")):
        record, row = read_record(path), path.parent.parent.name
        if record["row"] != row:
            raise UserError(f"{path} is the record of row {record['row']!r}, not of {row!r}")
        found[row] = record
    return found


def measurement_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 over what a record measured, and of what, in hex: the same in every format of records."""
    return value_digest({key: record[key] for key in ("row", "metrics", "inputs")})


def run_digest(folder: Path) -> str:
    """SHA-256 over all committed files of a row (record, diagnostics, pictures, curves), in hex."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return value_digest({path.relative_to(folder).as_posix(): file_digest(path) for path in files})
