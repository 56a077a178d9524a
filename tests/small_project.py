"""A tiny experiment on the digits, and its stages in real processes that die where a test wants them to.

Processes are forked from a server that has imported torch once, so that one costs a tenth of a second.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from import_graph import ROOT
from small_pipeline import ENVIRONMENT

from maskllm4v.training.finetuning import WeightLearner
from maskllm4v.training.mask_learning import MaskLearner
from maskllm4v.utils import distributed
from maskllm4v.utils.io import file_digest
from stages import entry

Params = dict[str, Any]
PATIENCE = 120  # seconds that a process of a test may take at most
STEPS, EVERY = 24, 5  # of every training, and between its states; 24 is more than an epoch
LONG = 200  # steps: time enough to see a state and to send a signal before they are over
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision", "timm", "timm.optim", "accelerate", "safetensors.torch"])


@dataclass(frozen=True)
class Death:
    """How a process ends, once it has done a step.

    ``kill``: SIGKILL, before a state is saved. ``writing``: SIGKILL, half the state written. ``term``: SIGTERM.
    """

    step: int
    how: Literal["kill", "writing", "term"] = "kill"


def tiny_params() -> Params:
    common = {"steps": STEPS, "batch_size": 64, "lr": 0.01, "log_every": 4}
    learned = {**common, "prior": "tiny-magnitude"}
    params: Params = {
        "table": "tiny",
        "title": "Tiny",
        "seeds": [0],
        "data": {"name": "digits", "source": "digits", "calibration": 45, "holdout": 51},
        "task": {"name": "classification", "shift": 1, "label_smoothing": 0.1},
        "model": {
            "name": "VisionTransformer",
            "args": {
                **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "class_token": False},
                **{"embed_dim": 32, "depth": 2, "num_heads": 4, "global_pool": "avg"},
                **{"dynamic_img_size": True, "drop_path_rate": 0.1},
            },
        },
        "dense": {
            **{**common, "row": "tiny-dense", "init": "scratch", "lr": 0.003},
            "progressive": {"size": 6, "steps": 12},
        },
        "priors": {
            "tiny-magnitude": {"method": "magnitude"},
            "tiny-wanda": {"method": "wanda", "batch_size": 20},
            "tiny-sparsegpt": {"method": "sparsegpt", "batch_size": 20},
        },
        "learned": {
            "tiny-averaged": {**learned, "ema": 0.9, "accumulate": 2, "select": "best"},
            "tiny-distilled": {**learned, "distillation": 0.5, "optimizer": "nadamw"},
        },
        "updated": {"tiny-squares": {"masks": "tiny-magnitude", "update": "least_squares", "batch_size": 20}},
        "finetuned": {"tiny-tuned": {**common, "start": "tiny-magnitude", "ema": 0.9, "lr": 0.001}},
        "exports": {},
        "runtime": {"device": "cpu", "checkpoint_minutes": 0, "checkpoint_steps": EVERY},
    }
    rows = ["tiny-dense", *params["priors"], *params["learned"], *params["updated"], *params["finetuned"]]
    return {**params, "rows": {row: row for row in rows}}


def ready_project(folder: Path, params: Params) -> Path:
    """A folder with data, dense model and prior."""
    write_params(folder, params)
    for stage, row in (("prepare", "digits"), ("dense", "tiny-dense"), ("prior", "tiny-magnitude")):
        assert run_stage(folder, stage, row) == [0], said(folder)
    return folder


def copied(project: Path, to: Path, params: Params | None = None) -> Path:
    """A project without its logs and states, and with other settings if given."""
    shutil.copytree(project, to, ignore=shutil.ignore_patterns(".cache", "steps-*", "said-*"))
    if params is not None:
        write_params(to, params)
    return to


def stage_of(row: str) -> str:
    params = tiny_params()
    return next((s for s, key in (("train", "learned"), ("finetune", "finetuned")) if row in params[key]), "dense")


def write_params(folder: Path, params: Params) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def results(folder: Path, row: str) -> dict[str, str]:
    """Digests of a row's tensors and curves, and of what says how they were made."""
    files = [*(folder / "artifacts" / row).rglob("*"), *(folder / "reports").glob(f"*/runs/{row}/curves/*")]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def states(folder: Path, row: str) -> list[Path]:
    """A row's saved states, and whatever else lies there."""
    return sorted((folder / ".cache/resume" / row).glob("*"))


def saved_steps(folder: Path, row: str) -> list[int]:
    """The step that each seed's newest state goes on with."""
    seeds = {path.name.partition("-")[0] for path in states(folder, row) if path.suffix == ".pt"}
    return [step for seed in sorted(seeds) if (step := _saved_step(folder, row, seed)) is not None]


def _saved_step(folder: Path, row: str, seed: str) -> int | None:
    """Of one seed, whose states come and go; None if it has none any more."""
    while saved := [path for path in states(folder, row) if path.match(f"{seed}-*.pt")]:
        with suppress(FileNotFoundError):  # the next one has been saved
            newest = max(saved, key=lambda path: path.stat().st_mtime_ns).read_bytes()
            return int(torch.load(io.BytesIO(newest), weights_only=True)["state"]["step"])
    return None


def steps(folder: Path, rank: int = 0) -> list[int]:
    """The steps that were done since this was last asked."""
    log = folder / f"steps-{rank}.txt"
    found = [int(line) for line in log.read_text().split()] if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def run_stage(folder: Path, stage: str, row: str, processes: int = 1, dies: Death | None = None) -> list[int]:
    """A stage, as its command line runs it; exit codes by rank, negative for signals."""
    return together(folder, stage_in, stage, row, dies, processes=processes)


def together(
    folder: Path | list[Path], function: Callable[..., None], *arguments: Any, processes: int = 1
) -> list[int]:
    """Call a function in each of several processes, inside a folder (one a process, or the same); exit codes by rank.

    What a process says on standard output and error is in ``said-<rank>.txt``. None may outlast the others' end.
    """
    folders = folder if isinstance(folder, list) else [folder] * processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[BaseProcess] = []
    for rank in range(processes):
        places = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment = {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        process = CONTEXT.Process(target=_child, args=(folders[rank], rank, environment, function, arguments))
        process.start()
        started.append(process)
    for process in started:
        process.join(PATIENCE)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
        process.close()
    heard = [said(folder, rank) for rank, folder in enumerate(folders)]
    assert None not in codes, f"processes hang: {codes}; they said {heard}"
    return [int(code) for code in codes if code is not None]


def started(folder: Path, *command: str, **environment: str) -> subprocess.Popen[bytes]:
    """A program in a session, and so a process group, of its own."""
    env = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with (folder / "said-0.txt").open("wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def until(condition: Callable[[], object]) -> None:
    """Wait for something that processes do."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def family(running: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A program and all processes that came from it."""
    one = psutil.Process(running.pid)
    return [one, *one.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    """Whether they have all ended (nobody need have asked for their exit status)."""
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def said(folder: Path, rank: int = 0) -> str:
    return (folder / f"said-{rank}.txt").read_text()


def ends(running: subprocess.Popen[bytes]) -> int:
    return running.wait(PATIENCE)


def begun(folder: Path, row: str, seeds: int, *command: str) -> subprocess.Popen[bytes]:
    """A program whose trainings have all saved a state, or another one than those that lay there."""
    with stopped(folder, row, seeds, *command) as (running, _):
        return running


@contextmanager
def stopped(
    folder: Path, row: str, seeds: int, *command: str
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """What :func:`begun` gives, and all its processes. They stand still inside, so that no training is over.

    Every state that is seen goes on from the one before.
    """
    before, numbers = saved_steps(folder, row) or [0] * seeds, _numbers(folder, row)
    running = started(folder, *command)

    def all_have() -> bool:
        assert running.poll() is None, said(folder)
        now = _numbers(folder, row)
        return len(now) == seeds and all(number > numbers.get(seed, 0) for seed, number in now.items())

    until(all_have)
    everything = family(running)
    for process in everything:
        process.suspend()
    try:
        assert all(step > first for step, first in zip(saved_steps(folder, row), before, strict=True))
        yield running, everything
    finally:
        for process in everything:  # the main one first: what it is told, it tells the others
            with suppress(psutil.NoSuchProcess):
                process.resume()


def tell(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that stands still, once it goes on: before, any thread of it might get the signal."""
    process.resume()
    process.send_signal(number)


def _numbers(folder: Path, row: str) -> dict[str, int]:
    """How many states each seed has saved, by the name of the newest one."""
    found: dict[str, int] = {}
    for path in states(folder, row):
        if path.suffix == ".pt" and not path.name.startswith("."):
            seed = path.name.partition("-")[0]
            found[seed] = max(found.get(seed, 0), int(path.stem.partition("_")[2]))
    return found


def _child(
    folder: Path, rank: int, environment: dict[str, int | str], function: Callable[..., None], arguments: Any
) -> None:
    os.chdir(folder)
    os.environ.update({key: str(value) for key, value in environment.items()})
    with open(f"said-{rank}.txt", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = io.TextIOWrapper(open(1, "wb", 0), write_through=True), open(2, "w", 1)  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        function(*arguments)
        distributed.leave()
    except Exception:
        traceback.print_exc()
        raise SystemExit(70) from None


def stage_in(stage: str, row: str, dies: Death | None) -> None:
    _watch(dies)
    sys.argv = [f"stages.{stage}", row]
    module = importlib.import_module(f"stages.{stage}")
    entry.run(stage, module.main, takes="name" if stage == "prepare" else "row", torch=stage != "prepare")


def _watch(dies: Death | None) -> None:
    """Write down every step done, and die as told."""
    log, save = Path(f"steps-{os.environ.get('RANK', 0)}.txt"), torch.save

    def watched(end_step: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
        def wrapper(learner: Any, step: int) -> None:
            end_step(learner, step)
            with log.open("a") as file:
                file.write(f"{step}\n")
            if dies is not None and step == dies.step and dies.how != "writing":
                os.kill(os.getpid(), signal.SIGKILL if dies.how == "kill" else signal.SIGTERM)

        return wrapper

    def dying_save(value: dict[str, Any], path: Path) -> None:
        whole = io.BytesIO()
        save(value, whole)
        last = dies is not None and dies.how == "writing" and value["state"]["step"] > dies.step
        path.write_bytes(whole.getvalue()[: whole.tell() // 2] if last else whole.getvalue())
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    MaskLearner.end_step = watched(MaskLearner.end_step)  # type: ignore[method-assign]
    WeightLearner.end_step = watched(WeightLearner.end_step)  # type: ignore[method-assign]
    torch.save = dying_save  # type: ignore[assignment]
