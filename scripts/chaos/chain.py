"""The shortened chain: a small project with all its results, and stages of it in processes of their own.

Processes are forked from a server that has imported torch once, so that most of the time goes into trials.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from maskllm4v.utils.io import file_digest
from scripts.rehearsal import ROOT, experiment, overridden, project

PATIENCE = 120.0  # seconds that a stage may take
TABLE = "chaos"
# What a stage of each kind is called, with its row, and what it writes.
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "prepare": ("digits", ("artifacts/data/digits",)),
    "dense": ("chaos-dense", ("artifacts/chaos-dense",)),
    "prior": ("chaos-wanda", ("artifacts/chaos-wanda",)),
    "train": ("chaos-maskllm", ("artifacts/chaos-maskllm", f"reports/{TABLE}/runs/chaos-maskllm/curves")),
    "update": ("chaos-squares", ("artifacts/chaos-squares",)),
    "finetune": ("chaos-tuned", ("artifacts/chaos-tuned", f"reports/{TABLE}/runs/chaos-tuned/curves")),
    "evaluate": ("chaos-maskllm", (f"reports/{TABLE}/runs/chaos-maskllm/evaluation",)),
    "export": ("chaos-maskllm", ("artifacts/exports/chaos-maskllm", f"reports/{TABLE}/runs/chaos-maskllm/export.json")),
    "report": (
        "",
        tuple(f"reports/{TABLE}/{name}" for name in ("table.md", "table.csv", "metrics.json", "index.html")),
    ),
    "documents": ("", ("README.md", "reports/index.html")),
    "track": ("", (f"mlruns/published/{TABLE}.json",)),
}
PRELOADED = [
    *(
        "torch",
        "torchvision",
        "timm",
        "timm.optim",
        "timm.data",
        "safetensors.torch",
        "accelerate",
        "sklearn",
        "pandas",
    ),
    *("pydantic", "yaml", "jinja2", "matplotlib.figure", "PIL.Image"),
    *("mlflow", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "mlflow.pytorch"),
]
TRAININGS = ("dense", "train", "finetune")
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Ended:
    """How a stage ended: its exit code, negative for signals, and what it said on both streams."""

    code: int
    said: str

    @property
    def is_named_error(self) -> bool:
        """Whether it failed with a sentence, not a traceback."""
        return self.code == 1 and bool(self.said.strip()) and "Traceback" not in self.said


def settings() -> dict[str, Any]:
    """The digits in a minute; a state is saved every five steps."""
    changed = {
        **{"table": TABLE, "title": "Chaos", "exact": False, "seeds": [0, 1], "updated": {}, "finetuned": {}},
        "dense.row": "chaos-dense",
        "dense.steps": 30,
        "priors": {"chaos-wanda": {"method": "wanda"}, "chaos-magnitude": {"method": "magnitude"}},
        "learned": {"chaos-maskllm": {"prior": "chaos-wanda", "steps": 30}},
        "updated.chaos-squares": {"masks": "chaos-wanda", "update": "least_squares"},
        "finetuned.chaos-tuned": {"start": "chaos-wanda", "steps": 30, "lr": 0.001},
        "exports": {"chaos-maskllm": {"formats": ["packed", "mask"]}},
        "runtime": {"device": "cpu", "live": False, "checkpoint_minutes": 0, "checkpoint_steps": 5},
    }
    found = overridden(experiment("digits"), changed)
    rows = ("chaos-dense", "chaos-wanda", "chaos-magnitude", "chaos-maskllm", "chaos-squares", "chaos-tuned")
    return {**found, "rows": {row: row for row in rows}}


@contextmanager
def whole_chain() -> Iterator[Path]:
    """A project in which every stage has ended well."""
    _CONTEXT.set_forkserver_preload(PRELOADED)
    with project(TABLE) as folder:
        (folder / "params.yaml").write_text(yaml.safe_dump(settings(), sort_keys=False))
        for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
            subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True)
        params = settings()
        order = [("prepare", "digits"), ("dense", "chaos-dense")]
        order += [("prior", row) for row in params["priors"]] + [("train", "chaos-maskllm")]
        order += [("update", "chaos-squares"), ("finetune", "chaos-tuned")]
        order += [("evaluate", row) for row in params["rows"]] + [("export", "chaos-maskllm")]
        for stage, row in [*order, ("report", ""), ("documents", ""), ("track", "")]:
            ended = wait(folder, start(folder, stage, row))
            if ended.code:
                raise SystemExit(f"{stage} {row} failed before anything was broken:\n{ended.said}")
        yield folder


def start(folder: Path, stage: str, row: str | None = None, environment: Mapping[str, str] = {}) -> BaseProcess:
    """A stage in a process group of its own; by default with the row that stands for its kind."""
    row = STAGES[stage][0] if row is None else row
    process = _CONTEXT.Process(target=_run, args=(folder, stage, row, dict(environment)))
    process.start()
    return process


def wait(folder: Path, process: BaseProcess) -> Ended:
    """Until it has ended; one that hangs is killed, which counts as a fault (code -9)."""
    process.join(PATIENCE)
    if process.exitcode is None:
        kill_group(process)
        process.join()
    code = process.exitcode
    assert code is not None
    return Ended(code, (folder / "said.txt").read_text(errors="replace"))


def kill_group(process: BaseProcess) -> None:
    with suppress(ProcessLookupError):
        os.killpg(int(process.pid or 0), signal.SIGKILL)


def results(folder: Path, stage: str) -> dict[str, str]:
    """Digests of what a stage wrote, by path."""
    found = {}
    for name in STAGES[stage][1]:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[file.relative_to(folder).as_posix()] = file_digest(file)
    return found


def copy(project: Path, to: Path) -> Path:
    """A project to break."""
    return shutil.copytree(project, to, symlinks=True)


def group_ends(group: int, seconds: float) -> bool:
    """Whether all processes of a group end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def _run(folder: Path, stage: str, row: str, environment: dict[str, str]) -> None:
    import torch

    os.setsid()
    os.chdir(folder)
    os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", **environment})
    with open("said.txt", "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    sys.argv[1:] = [row] if row else []
    runpy.run_module(f"stages.{stage}", run_name="__main__")
