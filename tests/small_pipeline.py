"""A small version of the digits experiment as a project of its own, and its stages, with DVC and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import warm_python
import yaml
from import_graph import ROOT

from maskllm4v.utils.io import file_digest
from scripts.rehearsal import dvc_file

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    **warm_python.QUIET,
    "GIT_CONFIG_GLOBAL": "/dev/null",
}
Params = dict[str, Any]


def small_params() -> Params:
    params: Params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"table": "small", "seeds": [3, 5]}
    params["data"]["calibration"] = 16
    params["dense"] |= {"row": "small-dense", "steps": 12}
    params["learning"] |= {"log_every": 5}
    params["priors"] = {
        "small-magnitude": {"method": "magnitude"},
        "small-sparsegpt-update": {"method": "sparsegpt", "update_weights": True},
    }
    params["learned"] = {"small-maskllm": {"prior": "small-magnitude", "steps": 8}}
    params["updated"] = {}
    params["finetuned"] = {"small-finetuned": {"start": "small-magnitude", "steps": 6, "lr": 0.001}}
    rows = ["small-dense", *params["priors"], *params["learned"], *params["finetuned"]]
    params["rows"] = {row: row for row in rows}
    params["exports"] = {
        "small-maskllm": {"formats": ["packed", "mask", "dense", "onnx"]},
        "small-dense": {"formats": ["dense"]},
    }
    return params


def new_project(folder: Path, params: Params) -> Path:
    """The code, without results, in a git repository of its own."""
    for name in ("maskllm4v", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.yaml").write_text(dvc_file(params["table"]))
    (folder / "experiments").mkdir(parents=True)
    for name in ("benchmarks", "receipts"):  # none ran
        (folder / "reports" / name).mkdir(parents=True)
    (folder / "README.md").write_text("<!-- small -->\n<!-- /small -->\n")
    (folder / "docs").mkdir()
    (folder / "docs/findings.md").write_text("none yet\n")
    write_params(folder, params)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True, env=ENVIRONMENT)
    run(folder, "dvc", "init", "-q").check_returncode()
    return folder


def write_params(folder: Path, params: Params) -> None:
    text = yaml.safe_dump(params, sort_keys=False)
    (folder / "params.yaml").write_text(text)
    (folder / "experiments" / "small.yaml").write_text(text)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command; ``dvc`` and the ``python`` that it calls are warm ones."""
    programs = f"{warm_python.python().parent}:{ENVIRONMENT['PATH']}"
    env = {**ENVIRONMENT, "PATH": programs, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def stage(
    folder: Path, name: str, *arguments: str, python: str = "python", **environment: str
) -> subprocess.CompletedProcess[str]:
    return run(folder, python, "-m", f"stages.{name}", *arguments, **environment)


def chain(folder: Path) -> None:
    """All stages but ``track``, in order, without DVC."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    steps = [("prepare", params["data"]["name"]), ("dense", params["dense"]["row"])]
    steps += [("prior", row) for row in params["priors"]] + [("train", row) for row in params["learned"]]
    steps += [("finetune", row) for row in params["finetuned"]]
    steps += [("evaluate", row) for row in params["rows"]] + [("export", row) for row in params["exports"]]
    for name, *arguments in [*steps, ("report",), ("documents",)]:
        done = stage(folder, name, *arguments)
        assert done.returncode == 0, done.stderr


def make_small(folder: Path) -> None:
    """The small version by DVC in ``repro``, what DVC said, and the results alone in ``project``."""
    project = new_project(folder / "repro", small_params())
    done = run(project, "dvc", "repro")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    copied(project, folder / "project")


def copied(project: Path, to: Path) -> Path:
    """A project for stages without DVC."""
    return shutil.copytree(project, to, ignore=shutil.ignore_patterns(".git", ".dvc", "mlruns", "mlflow.db"))


def digests(folder: Path) -> dict[str, str]:
    """Every result, tensors included."""
    files = [*(folder / "artifacts").rglob("*"), *(folder / "reports").rglob("*"), folder / "README.md"]
    return {str(path.relative_to(folder)): file_digest(path) for path in files if path.is_file()}
