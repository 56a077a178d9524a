"""Putting a receipt together, and writing it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import maskllm4v
from maskllm4v.config import PARAMS, Experiment, load_experiment
from maskllm4v.receipts.commit import Commit, NoCommitError, find_commit
from maskllm4v.receipts.environment import exported, lock_warning, package_versions, setting_warning, unlocked
from maskllm4v.receipts.locks import LOCK, stages_file
from maskllm4v.receipts.machine import X86_64, read_cpu, read_system
from maskllm4v.receipts.model import CPU, Receipt, Row
from maskllm4v.receipts.rows import compare_rows, results_digest, stages_since
from maskllm4v.runs.paths import REPORTS
from maskllm4v.utils.io import write_json


def build_receipt(
    root: Path,
    experiment: Experiment,
    *,
    begin: float | None = None,
    cpu: CPU | None = None,
    emulator: str | None = None,
    chain: Literal["full", "shortened"] = "full",
    rows: Mapping[str, Row] | None = None,
) -> Receipt:
    """A receipt of a table as it is on this machine.

    Nothing is private in it: no paths, no names of users or machines, and of the environment only what chooses kernels.

    Args:
        root: of the checkout. Where it is not a checkout, nothing is compared.
        experiment: whose table it is.
        begin: when the run began that made it, in seconds since 1970; None: not known.
        cpu: the CPU that results were made on; None: this one.
        emulator: what emulated it, such as ``"QEMU 7.2"``.
        chain: ``"shortened"`` where the pipeline was cut to a few steps.
        rows: the rows, by any names; None: those of the table, compared with the commit. A shortened chain gives its
            own, for instance :meth:`Row.compared` of what came out natively and emulated.

    Raises:
        UserError: a record or ``dvc.lock`` is damaged.
    """
    cpu = cpu or read_cpu()
    commit, committed, clean, why = _committed(root, experiment)
    packages, settings = unlocked(root), exported(os.environ)
    versions = package_versions(experiment.task.name)
    return Receipt(
        table=experiment.table,
        exact=experiment.exact,
        chain=chain,
        package=maskllm4v.__version__,
        commit=None if commit is None else commit.sha,
        clean=clean,
        results=results_digest(experiment, committed or {}),
        cpu=cpu,
        emulator=emulator,
        cores=None if emulator else os.cpu_count(),
        system=read_system(),
        python=platform.python_version(),
        versions=versions,
        locked=None if packages is None else not packages,
        unlocked=packages or {},
        settings=settings,
        seconds=None if begin is None else round(max(0.0, time.time() - begin), 1),
        stages=None if begin is None else stages_since(root, experiment, begin),
        warnings=_warnings(experiment, cpu, packages, settings, why),
        rows=compare_rows(root, experiment, committed) if rows is None else dict(rows),
    )


def receipt_file(root: Path, table: str) -> Path:
    """Where this machine's receipt lies; git ignores it."""
    return root / f"receipt-{table}.json"


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Write a receipt as JSON with sorted keys.

    Raises:
        UserError: the file cannot be written.
    """
    write_json(path, as_json(receipt))


def as_json(receipt: Receipt) -> dict[str, Any]:
    found: dict[str, Any] = receipt.model_dump(mode="json")
    return found


def published_experiments(root: Path) -> list[Experiment]:
    """Those in ``experiments/``.

    Raises:
        ConfigError: one of them is wrong.
    """
    return [load_experiment(path) for path in sorted((root / "experiments").glob("*.yaml"))]


def _committed(root: Path, experiment: Experiment) -> tuple[Commit | None, dict[str, bytes] | None, bool | None, str]:
    """The commit, its files of a table, whether code and settings are its; or None each, and why."""
    try:
        commit = find_commit(root)
        files = commit.files(LOCK, stages_file(experiment.table), f"{REPORTS}/{experiment.table}/runs")
        return commit, files, not _changed(root, experiment, commit), ""
    except NoCommitError as error:
        return None, None, None, str(error)


def _changed(root: Path, experiment: Experiment, commit: Commit) -> list[str]:
    """What results depend on and is not the commit's; params.yaml may hold any committed experiment (``make use``)."""
    changed = commit.changed()
    if changed != [str(PARAMS)]:
        return changed
    same = (e.model_copy(update={"runtime": experiment.runtime}) == experiment for e in published_experiments(root))
    return [] if any(same) else changed


def _warnings(
    experiment: Experiment,
    cpu: CPU,
    packages: Mapping[str, tuple[str | None, str]] | None,
    settings: Mapping[str, str],
    no_commit: str,
) -> list[str]:
    """What may be why results differ, a line each."""
    found = []
    if experiment.exact and cpu.architecture not in X86_64:
        found.append(f"{cpu.architecture} is not x86-64: exact results are not promised here")
    elif experiment.exact and cpu.avx2 is False:
        found.append("this CPU has no AVX2: exact results are not promised here")
    if packages is None:
        found.append("no requirements.lock here: not known whether this is the locked environment")
    elif packages:
        found.append(lock_warning(packages))
    found += [setting_warning(name, value, experiment.exact) for name, value in settings.items()]
    if no_commit:
        found.append(f"nothing to compare with: {no_commit}")
    return found
