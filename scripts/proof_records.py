"""Proof records: what the last full proof of each exact table was made from, as four digests.

``reports/proofs/<table>.json`` says which code, settings, locked packages and outputs were there when all stages of a
table ran again in an empty folder and gave every committed byte (:mod:`scripts.prove`, the only writer). As long as
all four match, the proof stands, and CI need not run the table again. No date, no time, no machine is part of them.

    python -m scripts.proof_records          all exact tables, and which of their records no longer match, and why
    python -m scripts.proof_records --check  the same; exit status 1 if one does not
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from maskllm4v.config import PARAMS, Experiment, load_experiment
from maskllm4v.receipts.locks import RENDERING, locked_stages, table_lock
from maskllm4v.runs.paths import REPORTS
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import file_digest, read_json, value_digest, write_json

PROOFS = REPORTS / "proofs"
PARTS = ("code", "settings", "packages", "outputs")
NO_RESULTS = {"runtime", "title"}  # settings that no result depends on, nor on what rows are called
Stages = dict[str, dict[str, Any]]


def record_file(table: str) -> Path:
    """Where a table's record is, relative to the repository's root."""
    return PROOFS / f"{table}.json"


def exact_tables(root: Path) -> dict[str, Path]:
    """The files in ``experiments/`` with ``exact: true`` by table; the table of ``params.yaml`` comes last."""
    active = load_experiment(root / PARAMS).table
    loaded = [(load_experiment(path), path) for path in sorted((root / "experiments").glob("*.yaml"))]
    found = {experiment.table: path for experiment, path in loaded if experiment.exact}
    return dict(sorted(found.items(), key=lambda item: item[0] == active))


def current_state(root: Path, file: Path) -> dict[str, str]:
    """The four digests of an experiment's table as the working tree is, by part.

    Raises:
        UserError: DVC cannot make sense of ``dvc.yaml`` with these settings.
    """
    experiment, stages = load_experiment(file), declared_stages(root, file)
    runs = files_below(root, [str(REPORTS / experiment.table / "runs")])
    locked = locked_stages(table_lock(root, experiment.table).read_bytes())
    return {
        "code": value_digest({"stages": stages, "files": files_below(root, given_paths(stages))}),
        "settings": value_digest(settings(experiment)),
        "packages": file_digest(root / "requirements.lock"),
        "outputs": value_digest({"runs": runs, "dvc.lock": {name: locked.get(name) for name in stages}}),
    }


def declared_stages(root: Path, file: Path, *, rendering: bool = False) -> Stages:
    """The stages of ``dvc.yaml`` with an experiment's names filled in, by name; the rendering ones only if asked for.

    By DVC's own resolver, which costs 0.1 s per table, in a folder with nothing but these settings. ``dvc.lock`` has
    the same names, but learns of a new dependency only when the stage runs.
    """
    from dvc.exceptions import DvcException
    from dvc.parsing import DataResolver
    from dvc.repo import Repo

    text = yaml.load((root / "dvc.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    with TemporaryDirectory() as folder:
        (Path(folder) / PARAMS).write_bytes(file.read_bytes())
        try:
            with Repo(folder, uninitialized=True) as repo:
                found: Stages = DataResolver(repo, folder, text).resolve()["stages"]
        except DvcException as error:
            raise UserError(f"dvc.yaml with {file.relative_to(root)}: {error}") from error
    kept = (name for name in found if rendering or name.partition("@")[0] not in RENDERING)
    return {name: {key: value for key, value in _plain(found[name]).items() if key != "desc"} for name in kept}


def _plain(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage whose settings are names in order; in ``dvc.yaml`` some are grouped, for an anchor to stand for them."""
    listed = ([entry] if isinstance(entry, str) else entry[str(PARAMS)] for entry in stage.get("params", []))
    names = sorted(name for names in listed for name in names)
    return {**stage, "params": names} if "params" in stage else dict(stage)


def given_paths(stages: Stages) -> list[str]:
    """Dependencies that no stage makes: the code."""
    made = {path_of(out) for stage in stages.values() for out in stage.get("outs", [])}
    needed = {path_of(dep) for stage in stages.values() for dep in stage.get("deps", [])}
    return sorted(path for path in needed if made.isdisjoint(map(str, (Path(path), *Path(path).parents))))


def path_of(entry: str | dict[str, Any]) -> str:
    """The path in an entry of ``deps`` or ``outs``, which has its flags as a mapping."""
    return entry if isinstance(entry, str) else next(iter(entry))


def files_below(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """Digests of all files at or below paths, those aside that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    names = sorted(set(listed.split("\0")) - {""})
    return {name: file_digest(root / name) for name in names if (root / name).is_file()}


def settings(experiment: Experiment) -> dict[str, Any]:
    """What results depend on: all but how it runs and what a report calls things; nothing that is at its default."""
    found = {key: value for key, value in experiment.beyond_defaults().items() if key not in NO_RESULTS}
    return {**found, "rows": sorted(experiment.rows)}


def why_stale(root: Path, file: Path) -> str | None:
    """Why the proof of an experiment's table does not stand for the working tree; None if it does."""
    path = record_file(load_experiment(file).table)
    if not (root / path).exists():
        return f"{path} is missing"
    try:
        record = read_json(root / path)
    except UserError as error:
        return str(error)
    state = current_state(root, file)
    if not isinstance(record, Mapping) or record.keys() != state.keys():
        return f"{path} is damaged: it should hold {', '.join(PARTS)}"
    changed = [part for part in PARTS if record[part] != state[part]]
    return f"{' and '.join(changed)} changed since the last proof" if changed else None


def write_record(root: Path, table: str, state: dict[str, str]) -> Path:
    """Keep the state that was proved; returns the record's path."""
    write_json(root / record_file(table), state)
    return root / record_file(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.proof_records", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="end with status 1 if a record does not match")
    arguments = parser.parse_args()
    reasons = {table: why_stale(Path(), file) for table, file in exact_tables(Path()).items()}
    for table, reason in reasons.items():
        print(f"{table}: {reason or 'proved'}")
    if arguments.check and any(reasons.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
