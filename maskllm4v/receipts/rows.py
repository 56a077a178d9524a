"""The rows of a table as they came out here, compared with those of the commit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maskllm4v.config import Experiment
from maskllm4v.receipts.digits import metric_differences
from maskllm4v.receipts.locks import LOCK, damaged_lock, is_lock, locked_stages, stages_file
from maskllm4v.receipts.model import Row, Stage
from maskllm4v.runs.paths import ARTIFACTS, REPORTS, TIMINGS, export_folder, record_file, run_folder
from maskllm4v.runs.records import run_digest, settings_digest
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import value_digest

RECORD = "evaluation/record.json"  # in a row's folder
Files = Mapping[str, bytes]  # by path below the root


def table_files(root: Path, experiment: Experiment) -> dict[str, bytes]:
    """All that is to be committed of a table's rows, and what DVC has locked of it, as they lie here."""
    paths = [path for row in experiment.rows for path in run_folder(experiment.table, row, root / REPORTS).rglob("*")]
    found = [path for path in [*sorted(paths), root / stages_file(experiment.table), root / LOCK] if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def compare_rows(root: Path, experiment: Experiment, committed: Files | None) -> dict[str, Row]:
    """Each row of a table as it is here.

    Args:
        root: of the checkout.
        experiment: whose table it is.
        committed: the files of :func:`table_files` as they were committed; None: there is no commit.

    Raises:
        UserError: a record or ``dvc.lock`` is damaged.
    """
    here, before = table_files(root, experiment), committed or {}
    own, theirs = artifact_digests(here), artifact_digests(before)
    found = {}
    for row in experiment.rows:
        folders = [folder.as_posix() for folder in (ARTIFACTS / row, export_folder(row))]
        committed_row, own_row = (
            _State(_below(files, experiment, row), {name: digests[name] for name in folders if name in digests})
            for files, digests in ((before, theirs), (here, own))
        )
        ran = [stage for stage in stages_of(experiment, row) if _timing(root, stage, row).exists()]
        try:
            found[row] = _compare(experiment, row, committed_row, own_row, ran)
        except ValidationError as error:  # metrics with names that a receipt does not take
            raise _damaged(experiment, row) from error
    return found


def results_digest(experiment: Experiment, files: Files) -> str | None:
    """Digest of all committed rows of a table: what a receipt was compared with. None: there are none."""
    digests = {row: row_digest(_below(files, experiment, row)) for row in experiment.rows}
    found = {row: digest for row, digest in digests.items() if digest is not None}
    return value_digest(found) if found else None


def results_here(experiment: Experiment, reports: Path) -> str | None:
    """The same of the results that lie in a folder of reports."""
    folders = {row: run_folder(experiment.table, row, reports) for row in experiment.rows}
    found = {row: run_digest(folder) for row, folder in folders.items() if any(folder.rglob("*"))}
    return value_digest(found) if found else None


def row_digest(files: Files) -> str | None:
    """:func:`~maskllm4v.runs.records.run_digest` of a row's files by path below its folder; None: there are none."""
    return value_digest({name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}) if files else None


def artifact_digests(files: Files) -> dict[str, str]:
    """What DVC has locked of weights, masks and exports: a digest by folder.

    Raises:
        UserError: ``dvc.lock`` is damaged, for instance by a merge.
    """
    outs: dict[str, str] = {}
    try:
        for path in sorted(filter(is_lock, files), key=LOCK.__eq__):  # dvc.lock, the active table's, counts most
            for stage in locked_stages(files[path]).values():
                outs |= {out["path"]: out["md5"] for out in stage.get("outs", [])}
        return {path: digest for path, digest in outs.items() if path.startswith(f"{ARTIFACTS}/")}
    except (AttributeError, KeyError, TypeError) as error:
        raise damaged_lock() from error


def stages_of(experiment: Experiment, row: str) -> list[Stage]:
    """The stages that make a row."""
    exported: list[Stage] = ["export"] if row in experiment.exports else []
    return [experiment.row(row).stage, "evaluate", *exported]


def stages_since(root: Path, experiment: Experiment, begin: float) -> int:
    """How many stages of an experiment ended on this machine at ``begin`` (seconds since 1970) or later."""
    ended: list[tuple[str, str]] = [("prepare", experiment.data.name)]
    ended += [(stage, experiment.table) for stage in ("report", "documents", "track")]
    ended += [(stage, row) for row in experiment.rows for stage in stages_of(experiment, row)]
    timings = [_timing(root, stage, key) for stage, key in ended]
    return sum(path.exists() and path.stat().st_mtime >= begin for path in timings)


def _timing(root: Path, stage: str, key: str) -> Path:
    """What a stage leaves when it ends; git ignores it, and so it is there only if the stage ran here."""
    return root / TIMINGS / f"{stage}@{key}.json"


@dataclass(frozen=True)
class _State:
    """A row in the commit or here: its files by path below its folder, and digests of its artifacts by folder."""

    files: dict[str, bytes]
    artifacts: dict[str, str]

    @property
    def record(self) -> dict[str, Any] | None:
        """None where it is missing or damaged."""
        try:
            found = json.loads(self.files.get(RECORD, b""))
        except ValueError:
            return None
        whole = isinstance(found, dict) and "settings_digest" in found and _are_metrics(found.get("metrics"))
        return found if whole else None


def _compare(experiment: Experiment, row: str, before: _State, now: _State, ran: list[Stage]) -> Row:
    old, new = before.record or {}, now.record
    if new is None and RECORD in now.files:
        raise _damaged(experiment, row)
    common: dict[str, Any] = {"committed": row_digest(before.files), "ran": ran}
    if new is None or new["settings_digest"] != settings_digest(experiment, row):
        return Row(verdict="not made", **common)
    common |= {"here": row_digest(now.files), "artifacts": now.artifacts, "metrics": new["metrics"]}
    if not before.files:
        return Row(verdict="not committed", **common)
    if old.get("settings_digest", new["settings_digest"]) != new["settings_digest"]:
        return Row(verdict="other settings", **common)
    differing = [folder for folder, digest in now.artifacts.items() if before.artifacts.get(folder, digest) != digest]
    names = sorted(name for name in before.files.keys() | now.files.keys() if name != RECORD)
    differing += [re.sub(r"[^\w./-]", "?", n) for n in names if before.files.get(n) != now.files.get(n)]
    differences = metric_differences(old.get("metrics", {}), new["metrics"])
    if keys := _other_keys(old, new, bool(differences)):
        differing.append(f"{RECORD}: {', '.join(keys)}")
    equal = not differing and common["here"] == common["committed"]
    return Row(verdict="equal" if equal else "differs", differences=differences, differing=differing, **common)


def _damaged(experiment: Experiment, row: str) -> UserError:
    return UserError(f"{record_file(experiment.table, row)} is damaged; make the row again")


def _are_metrics(found: Any) -> bool:
    """Numbers by seed, then by name."""
    if not isinstance(found, dict) or not all(seed.isdecimal() and isinstance(v, dict) for seed, v in found.items()):
        return False
    return all(type(value) in (int, float) for values in found.values() for value in values.values())


def _below(files: Files, experiment: Experiment, row: str) -> dict[str, bytes]:
    """A row's files, by path below its folder."""
    folder = f"{run_folder(experiment.table, row).as_posix()}/"
    return {name.removeprefix(folder): content for name, content in files.items() if name.startswith(folder)}


def _other_keys(old: Mapping[str, Any], new: Mapping[str, Any], metrics_differ: bool) -> list[str]:
    """The keys of a record that differ, apart from metrics whose values do and summaries, which repeat them."""
    if not old:
        return ["missing in the commit"]
    keys = [key for key in sorted((old.keys() | new.keys()) - {"digest"}) if old.get(key) != new.get(key)]
    names = [{seed: sorted(values) for seed, values in record.get("metrics", {}).items()} for record in (old, new)]
    told = {"metrics", "summaries"} if metrics_differ and names[0] == names[1] else set()
    return [key for key in keys if key not in told]
