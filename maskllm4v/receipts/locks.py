"""What DVC has locked of each table: commands, dependencies, settings and outputs of its stages.

DVC parses and writes the whole of ``dvc.lock`` after every stage, which takes a quarter of a millisecond of CPU per
line. So it holds the stages of the active table only, and those that show records. The stages of any other table lie
in ``reports/<table>/stages.lock``, in the same form, and :func:`activate` exchanges them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from maskllm4v.config import PARAMS, Experiment, load_experiment
from maskllm4v.runs.paths import REPORTS
from maskllm4v.utils.errors import ConfigError, UserError
from maskllm4v.utils.io import write_text

LOCK = "dvc.lock"
HEAD = "schema: '2.0'\nstages:\n"
RENDERING = frozenset({"report", "documents", "track"})  # stages that only show records, whichever table is active
_STAGE = re.compile(r"  (\S+):")


def stages_file(table: str) -> str:
    """Where the stages of a table lie that is not active, relative to the repository's root."""
    return f"{REPORTS}/{table}/stages.lock"


def is_lock(path: str) -> bool:
    """Whether a path below the root is one of the files that say what is locked."""
    return path == LOCK or (path.startswith(f"{REPORTS}/") and path.endswith("/stages.lock"))


def table_lock(root: Path, table: str) -> Path:
    """The file that says what is locked of a table: ``dvc.lock``, unless it has one of its own, as inactive ones do."""
    own = root / stages_file(table)
    return own if own.exists() else root / LOCK


def lock_files(root: Path) -> list[Path]:
    """All files that say what is locked, ``dvc.lock`` last."""
    found = [*sorted(root.glob(stages_file("*"))), root / LOCK]
    return [path for path in found if path.is_file()]


def locked_stages(text: str | bytes) -> dict[str, dict[str, Any]]:
    """What a file of this kind says of each stage, by name.

    Raises:
        UserError: it is damaged, for instance by a merge.
    """
    try:
        found: dict[str, dict[str, Any]] = (yaml.load(text, yaml.CBaseLoader) or {}).get("stages", {})
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise damaged_lock() from error
    return found


def damaged_lock() -> UserError:
    return UserError(f"{LOCK} is damaged; `git checkout {LOCK}` brings back the committed one")


def stage_texts(text: str) -> dict[str, str]:
    """A file in pieces: each stage's lines, by its name; what comes before the first is left out."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if name := _STAGE.fullmatch(line.rstrip("\n")):
            lines = found.setdefault(name[1], [])
        lines.append(line)
    return {name: "".join(lines) for name, lines in found.items()}


def lock_text(stages: Mapping[str, str]) -> str:
    """The file that :func:`stage_texts` takes apart."""
    return HEAD + "".join(stages.values())


def activate(root: Path, file: Path) -> None:
    """Make an experiment the one that ``params.yaml`` holds, and its table's stages those in ``dvc.lock``.

    What prepares the data of several tables is locked for each as it ran for that one: a task's settings are among its
    dependencies.
    Stages that belong to no table stay in ``dvc.lock``. If this is interrupted, the same call completes it.

    Raises:
        ConfigError: the experiment is wrong.
    """
    experiment = load_experiment(file)
    others = _others(root, experiment)
    lock, stored = root / LOCK, root / stages_file(experiment.table)
    before, coming = _read(lock), _read(stored)
    owners = {name: _owner(name, [experiment, *others]) for name in before}
    for other in others:
        if other.table in owners.values():
            path = root / stages_file(other.table)
            own = {name: text for name, text in before.items() if _belongs(name, other)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, lock_text(_read(path) | own))
    own = {name: text for name, text in before.items() if owners[name] == experiment.table}
    strays = {name: text for name, text in before.items() if owners[name] is None}
    if after := coming | {name: text for name, text in own.items() if name not in coming} | strays:
        write_text(lock, lock_text(after))
    write_text(root / PARAMS, file.read_text(encoding="utf-8"))
    stored.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, str]:
    return stage_texts(path.read_text(encoding="utf-8")) if path.exists() else {}


def _others(root: Path, experiment: Experiment) -> list[Experiment]:
    """The experiments of other tables, that of ``params.yaml`` first; those with a fault are nobody's."""
    found: dict[str, Experiment] = {}
    for path in (root / PARAMS, *sorted((root / "experiments").glob("*.yaml"))):
        try:
            other = load_experiment(path)
        except ConfigError:
            continue
        if other.table != experiment.table:
            found.setdefault(other.table, other)
    return list(found.values())


def _owner(name: str, experiments: Iterable[Experiment]) -> str | None:
    """The first table that a stage belongs to."""
    return next((experiment.table for experiment in experiments if _belongs(name, experiment)), None)


def _belongs(name: str, experiment: Experiment) -> bool:
    """Whether a stage is one of an experiment's; what prepares data may be that of several."""
    stage, _, key = name.partition("@")
    return key == experiment.data.name if stage == "prepare" else key in experiment.rows
