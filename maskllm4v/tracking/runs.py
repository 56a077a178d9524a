"""What a run says of its row besides numbers: name, parameters, tags, files."""

from __future__ import annotations

import colorsys
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskllm4v.config import Experiment
from maskllm4v.reporting.marks import escaped
from maskllm4v.runs.paths import ARTIFACTS, REPORTS, export_folder, run_folder
from maskllm4v.runs.records import settings_digest
from maskllm4v.utils.io import file_digest, value_digest
from maskllm4v.utils.text import plain

LARGEST_ARTIFACT = 32 * 2**20  # bytes of masks; with updated weights of a large model they stay in DVC's cache
LIVE = "live"  # the tag of a run that is written while its row trains


def identity(experiment: Experiment, row: str) -> dict[str, str]:
    """The tags that tell one run from another."""
    return {"row": row, "settings_digest": settings_digest(experiment, row)}


def parameters(experiment: Experiment, row: str) -> dict[str, str]:
    """All settings of a row, those at their defaults, too, as MLflow's parameters: ``learning.steps`` and so on."""
    settings = experiment.row(row).record_settings(defaults=True)
    return {key: str(value)[:6000] for key, value in flatten(settings).items()}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key`` names; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def settings_tags(experiment: Experiment, row: str) -> dict[str, str]:
    """What runs are found by, as far as settings say it."""
    found = experiment.row(row)
    settings = found.record_settings()
    tags = {
        "stage": found.stage,
        "task": settings["task"]["name"],
        "method": found.method,
        "prior": found.start,
        "weights": "updated" if found.updates_weights else "dense",
        "pattern": found.pattern or "dense",
        "model": settings["model"]["name"],
        "exact": str(experiment.exact).lower(),
        "mlflow.note.content": escaped(found.label),  # shown as Markdown
        "mlflow.runColor": _colour(list(experiment.rows).index(row)),
    }
    return {key: value for key, value in tags.items() if value}


def record_tags(root: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Where a result is from."""
    tags = {
        "hardware": plain(record["made"]["hardware"]),
        "world_size": str(record["made"]["world_size"]),
        "git_commit": _git_commit(root),
        "dvc.exp": os.environ.get("DVC_EXP_NAME", ""),  # of `dvc exp run`
    }
    return {key: value for key, value in tags.items() if value}


def row_files(root: Path, experiment: Experiment, row: str) -> Iterator[tuple[Path, str | None]]:
    """A row's files and the folder each goes to; masks and exported models only where they lie on this machine."""
    folder = run_folder(experiment.table, row, root / REPORTS)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parent = path.relative_to(folder).parent.as_posix()
            yield path, None if parent == "." else parent
    if row != experiment.dense.row:
        for path in sorted((root / ARTIFACTS / row).glob("*.safetensors")):
            if path.stat().st_size <= LARGEST_ARTIFACT:
                yield path, "masks"
    for path in sorted((root / export_folder(row)).glob("*")):  # all of them: somebody asked for each
        yield path, "export"


def report_files(root: Path, table: str) -> list[Path]:
    """The table, its page and figures, which each of its runs shows."""
    folder = root / REPORTS / table
    named = [folder / name for name in ("index.html", "table.md", "exports.md")]
    return [path for path in [*named, *sorted((folder / "figures").glob("*"))] if path.is_file()]


def report_digest(files: list[Path]) -> str:
    return value_digest({path.name: file_digest(path) for path in files})


def _colour(number: int) -> str:
    """Of a row in the UI's charts, which would give some rows the same: hues far apart, bright and dark in turn."""
    parts = colorsys.hls_to_rgb(number * 0.618 % 1, (0.42, 0.58)[number % 2], 0.65)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def _git_commit(root: Path) -> str:
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()
