"""A checkout with committed results of the digits' table, all of them made there, to be changed and compared."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from import_graph import ROOT
from made_records import DIGITS, make_records

from maskllm4v.config import Experiment
from maskllm4v.receipts import CPU, Receipt, build_receipt
from maskllm4v.receipts.rows import stages_of
from maskllm4v.receipts.text import verdict
from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import write_record
from maskllm4v.utils.io import file_digest, read_json, write_json

EPYC = CPU(name="AMD EPYC", architecture="x86_64", vendor="AuthenticAMD", family=25, model=17, stepping=1, avx2=True)
WANDA = "digits-wanda"


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def make_checkout(folder: Path, experiment: Experiment = DIGITS) -> Path:
    """Code in a word, settings and results, committed; every stage has run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (".gitignore", "params.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    (folder / "maskllm4v").mkdir()
    (folder / "maskllm4v" / "code.py").write_text("one\n")
    make_records(experiment, folder / "reports")
    write_lock(folder, experiment)
    run_stages(folder, experiment)
    git(folder, "init", "-q")
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "results")


def write_lock(folder: Path, experiment: Experiment, **changed: str) -> None:
    """``dvc.lock`` as far as it says what artifacts came out as; ``changed``: digests by row, ``_`` for ``-``."""
    outs = {row: f"{row}.dir" for row in experiment.rows} | {k.replace("_", "-"): v for k, v in changed.items()}
    stages: dict[str, Any] = {
        f"{stages_of(experiment, row)[0]}@{row}": {"cmd": "x", "outs": [{"path": f"artifacts/{row}", "md5": digest}]}
        for row, digest in outs.items()
    }
    for row in experiment.exports:
        outs_of_export = [
            {"path": f"artifacts/exports/{row}", "md5": "0e0e.dir"},
            {"path": "reports/x.json", "md5": "f"},
        ]
        stages[f"export@{row}"] = {"cmd": "x", "outs": outs_of_export}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))


def run_stages(folder: Path, experiment: Experiment, *left_out: str) -> None:
    """Leave what stages leave when they end."""
    for row in experiment.rows:
        for stage in stages_of(experiment, row):
            if stage not in left_out:
                write_json(folder / ".cache" / "timings" / f"{stage}@{row}.json", {"seconds": 1.0})


def change_metric(folder: Path, row: str = WANDA, seed: int = 1, **values: float) -> None:
    """Have a row come out otherwise."""
    change_record(folder, row, lambda record: record["metrics"][str(seed)].update(values))


def change_record(folder: Path, row: str, change: Any) -> None:
    path = record_file("digits", row, folder / "reports")
    record = read_json(path)
    change(record)
    write_record(path, record)


def snapshot(folder: Path) -> Mapping[str, str]:
    """Digests of all files but git's own."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def receipt(folder: Path, experiment: Experiment = DIGITS, **known: Any) -> Receipt:
    return build_receipt(folder, experiment, **{"cpu": EPYC, **known})


def said(found: Receipt, width: int = 80) -> str:
    return "\n".join(verdict(found, width))


def first_line(found: Receipt) -> str:
    return said(found, 1000).splitlines()[0]
