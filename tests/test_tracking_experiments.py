"""``dvc exp run --temp`` and ``--queue``: runs in the repository's store, beside what its workspace shows."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import runs, their_warnings
from small_pipeline import ENVIRONMENT, Params, new_project, run, small_params

from maskllm4v.runs.workspace import has_store, is_copy, main_root

ROW = "small-maskllm"
LR = f"learned.{ROW}.lr"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    with their_warnings():
        yield


def params() -> Params:
    found = small_params() | {"finetuned": {}, "exports": {}, "seeds": [0]}
    del found["priors"]["small-sparsegpt-update"]
    found["rows"] = {row: row for row in ("small-dense", "small-magnitude", ROW)}
    found["learned"][ROW]["lr"] = 0.01
    return found


def git(folder: Path, *arguments: str) -> None:
    people = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *people, *arguments], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)


def by_lr(project: Path) -> dict[str, Any]:
    found = [run for run in runs(f"sqlite:///{project}/mlflow.db", "small") if run.data.tags["row"] == ROW]
    assert all(run.info.status == "FINISHED" and "record_digest" in run.data.tags for run in found)
    assert len(found) == len({run.data.params["learning.lr"] for run in found})
    return {run.data.params["learning.lr"]: run for run in found}


@pytest.mark.slow
def test_experiments_stand_beside_the_workspace(tmp_path: Path) -> None:
    project = new_project(tmp_path, params())
    for name in ("benchmarks", "receipts"):
        (project / f"reports/{name}/.gitkeep").touch()  # a copy has what git has
    done = run(project, "dvc", "repro")
    assert done.returncode == 0, done.stderr
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "all")
    stamp = (project / "mlruns/published/small.json").read_bytes()

    done = run(project, "dvc", "exp", "run", "--temp", "-n", "apart", "-S", f"{LR}=0.02")
    assert done.returncode == 0, done.stdout + done.stderr
    for command in (
        ("dvc", "exp", "run", "--queue", "-n", "queued", "-S", f"{LR}=0.03"),
        ("dvc", "exp", "run", "--run-all"),
    ):
        done = run(project, *command)
        assert done.returncode == 0, done.stdout + done.stderr

    found = by_lr(project)
    assert {lr: one.data.tags["current"] for lr, one in found.items()} == {
        "0.01": "true",
        "0.02": "false",
        "0.03": "false",
    }
    names = {lr: one.data.tags.get("dvc.exp") for lr, one in found.items()}
    assert names == {"0.01": None, "0.02": "apart", "0.03": "queued"}
    assert len(runs(f"sqlite:///{project}/mlflow.db", "small")) == 5
    assert all(one.info.artifact_uri.startswith(f"file://{project}/mlruns/") for one in found.values())
    assert (project / "mlruns/published/small.json").read_bytes() == stamp
    assert "up to date" in run(project, "dvc", "repro").stdout

    for command in (("dvc", "exp", "apply", "apart"), ("dvc", "repro")):
        done = run(project, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    after = by_lr(project)
    assert {lr: one.info.run_id for lr, one in after.items()} == {lr: one.info.run_id for lr, one in found.items()}
    assert {lr: one.data.tags["current"] for lr, one in after.items()} == {
        "0.01": "false",
        "0.02": "true",
        "0.03": "false",
    }


def test_a_copy_knows_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, clone = tmp_path / ".dvc/tmp/exps/tmp0", tmp_path / "clone"
    copy.mkdir(parents=True)
    assert (main_root(copy), is_copy(copy)) == (copy, False)  # by itself, a folder as any other
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert (main_root(copy), is_copy(copy)) == (tmp_path, True)
    assert (main_root(tmp_path), is_copy(tmp_path)) == (tmp_path, False)
    assert (main_root(clone), is_copy(clone)) == (clone, False)  # made by a stage, whose variable it inherits
    assert not has_store(copy)
    (tmp_path / "mlflow.db").touch()
    assert has_store(copy)
    assert not has_store(clone)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert has_store(clone)
