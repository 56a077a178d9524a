"""One trial of each kind: break something, look at how it ends, and whether the same command then mends it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.chaos.chain import (
    ENVIRONMENT,
    PATIENCE,
    STAGES,
    TRAININGS,
    Ended,
    copy,
    group_ends,
    kill_group,
    results,
    start,
    wait,
)

SAME, NAMED, FAULT, SKIPPED = "same bytes", "named error", "fault", "skipped"
Outcome = tuple[str, str]  # which of these, and what was seen
Trial = Callable[[Path, random.Random], Outcome]

# What a stage reads, by the stage that is run then.
READ = {
    "manifest": ("prior", "artifacts/data/digits/manifest.json"),
    "list of images": ("dense", "artifacts/data/digits/train.csv"),
    "dense weights": ("prior", "artifacts/chaos-dense/seed0.safetensors"),
    "masks": ("train", "artifacts/chaos-wanda/seed0.safetensors"),
    "origin": ("evaluate", "artifacts/chaos-maskllm/made.json"),
    "record": ("report", "reports/chaos/runs/chaos-wanda/evaluation/record.json"),
    "curve": ("report", "reports/chaos/runs/chaos-maskllm/curves/seed0.csv"),
    "settings": ("prior", "params.yaml"),
}
OTHERS = {
    "dense weights": "artifacts/chaos-dense/seed1.safetensors",
    "masks": "artifacts/chaos-magnitude/seed0.safetensors",
    "origin": "artifacts/chaos-wanda/made.json",
    "record": "reports/chaos/runs/chaos-magnitude/evaluation/record.json",
}


def kill_stage(stage: str) -> Trial:
    """SIGKILL or SIGTERM at any time; the same command then gives the same bytes."""

    def trial(project: Path, draw: random.Random) -> Outcome:
        before = results(project, stage)
        _remove(project, stage)
        for _ in range(draw.choice((1, 1, 2))):
            process = start(project, stage)
            process.join(draw.uniform(0.05, 2.5))
            if process.exitcode is None:
                group = int(process.pid or 0)
                if draw.random() < 0.3:
                    with suppress(ProcessLookupError):
                        os.killpg(group, signal.SIGTERM)
                else:
                    kill_group(process)
                wait(project, process)
                if not group_ends(group, 20):
                    return FAULT, "a process of the stage lives on"
        return _again(project, stage, before)

    return trial


def kill_dvc(project: Path, draw: random.Random) -> Outcome:
    """DVC alone, while a training runs: the training ends with it, and DVC then goes on."""
    stage = draw.choice(TRAININGS)
    row, before = STAGES[stage][0], results(project, stage)
    command = ["dvc", "repro", "--single-item", f"{stage}@{row}"]
    with (project / "dvc.txt").open("wb") as log:
        options = {"cwd": project, "env": ENVIRONMENT, "stdout": log, "stderr": log, "start_new_session": True}
        running = subprocess.Popen(command, **options)
        end = time.monotonic() + PATIENCE
        while running.poll() is None and not _states(project, row) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1))
        running.kill()
        running.wait()
        if not group_ends(running.pid, 30):
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            return FAULT, "the stage outlives its DVC"
        code = subprocess.run(command, **{**options, "timeout": PATIENCE}, check=False).returncode
    if code:
        return FAULT, (project / "dvc.txt").read_text()[-500:]
    return _compared(project, stage, before)


def damage(kind: str) -> Trial:
    """A file is cut, emptied, removed, exchanged or changed by a bit: a sentence says so, or nothing depends on it."""

    def trial(project: Path, draw: random.Random) -> Outcome:
        stage, name = READ[kind]
        path, before = project / name, results(project, stage)
        _remove(project, stage)
        content = path.read_bytes()
        hows = ["bit", "half", "empty", "gone", "noise", *(["other"] if kind in OTHERS else [])]
        how = draw.choice(hows)
        if how == "gone":
            path.unlink()
        elif how == "other":
            shutil.copy(project / OTHERS[kind], path)
        else:
            path.write_bytes(_damaged(content, how, draw))
        ended = wait(project, start(project, stage))
        if ended.code == 0:
            outcome, seen = _compared(project, stage, before)
            return outcome, f"{how}: {seen}"
        if not ended.is_named_error:
            return FAULT, f"{how}: {_last(ended)}"
        path.write_bytes(content)
        outcome, seen = _again(project, stage, before)
        return (NAMED if outcome == SAME else outcome), f"{how}: {seen or _last(ended)}"

    return trial


def damage_state(project: Path, draw: random.Random) -> Outcome:
    """The state of an interrupted training: a sentence names it, and without it the training begins anew."""
    stage = draw.choice(TRAININGS)
    before = results(project, stage)
    state = _interrupted(project, stage, draw)
    if state is None:
        return SKIPPED, "it had ended"
    state.write_bytes(_damaged(state.read_bytes(), draw.choice(("bit", "half", "empty", "noise")), draw))
    ended = wait(project, start(project, stage))
    if ended.code == 0:
        return _compared(project, stage, before)
    if not ended.is_named_error or state.name not in ended.said:
        return FAULT, _last(ended)
    state.unlink()
    outcome, seen = _again(project, stage, before)
    return (NAMED if outcome == SAME else outcome), seen


def set_clock_back(project: Path, draw: random.Random) -> Outcome:
    """States lie there from years to come, of these settings and of others; the newest one is gone on from."""
    stage = draw.choice(TRAININGS)
    before = results(project, stage)
    state = _interrupted(project, stage, draw)
    if state is None:
        return SKIPPED, "it had ended"
    seed = state.name.partition("-")[0]
    for number in (1, 2):
        shutil.copy(state, state.with_name(f"{seed}-{number:016x}_{number}.pt"))
    for path in state.parent.glob("*.pt"):
        os.utime(path, (draw.uniform(0, 2**33), draw.uniform(0, 2**33)))
    again = _interrupted(project, stage, draw)
    if again is not None and not again.exists():
        return FAULT, "the state just saved is gone"
    return _again(project, stage, before)


def fill_disk(place: str) -> Trial:
    """A disk under states, timings or results that is full at any size; it is emptied if the stage failed."""

    def trial(project: Path, draw: random.Random) -> Outcome:
        stage = draw.choice(TRAININGS)
        before = results(project, stage)
        _remove(project, stage)
        folder = project / (STAGES[stage][1][0] if place == "results" else place)
        with _small_disk(folder, draw.choice((4, 32, 128, 512))) as mounted:
            if not mounted:
                return SKIPPED, "only root may mount"
            ended = wait(project, start(project, stage))
            if ended.code == 0:
                return _compared(project, stage, before)
            if place != "results" or not ended.is_named_error:
                return FAULT, _last(ended)
        outcome, seen = _again(project, stage, before)
        return (NAMED if outcome == SAME else outcome), seen

    return trial


def silent_server(project: Path, draw: random.Random) -> Outcome:
    """It accepts and never answers: tracking says so in time, and trainings do not care."""
    stage = draw.choice(("track", "track", "train"))
    before = results(project, stage)
    _remove(project, stage)
    settings = project / "params.yaml"
    settings.write_text(settings.read_text().replace("live: false", "live: true"))
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"  # the kernel accepts, and nobody reads
        limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(draw.randrange(2))}
        ended = wait(project, start(project, stage, environment={"MLFLOW_TRACKING_URI": uri, **limits}))
    if stage == "train":
        return _compared(project, stage, before) if ended.code == 0 else (FAULT, _last(ended))
    if not ended.is_named_error or "does it answer" not in ended.said:
        return FAULT, _last(ended)
    outcome, seen = _again(project, stage, before)
    return (NAMED if outcome == SAME else outcome), seen


def two_trainers(project: Path, draw: random.Random) -> Outcome:
    """Of the same row, at once: one is refused by name, and the other one's bytes are right."""
    stage = draw.choice(TRAININGS)
    before = results(project, stage)
    _remove(project, stage)
    first = start(project, stage)
    time.sleep(draw.uniform(0, 1))
    second = start(project, stage)
    ended = [wait(project, process) for process in (first, second)]
    codes = sorted(one.code for one in ended)
    if codes not in ([0, 0], [0, 1]):
        return FAULT, f"exit codes {codes}"
    outcome, seen = _compared(project, stage, before)
    return (NAMED if outcome == SAME and codes == [0, 1] else outcome), seen


def trials() -> Mapping[str, Trial]:
    """All kinds, by name."""
    return {
        **{f"kill {stage}": kill_stage(stage) for stage in STAGES},
        "kill dvc": kill_dvc,
        **{f"damage {kind}": damage(kind) for kind in READ},
        "damage state": damage_state,
        "full disk, states": fill_disk(".cache/resume"),
        "full disk, timings": fill_disk(".cache/timings"),
        "full disk, results": fill_disk("results"),
        "silent server": silent_server,
        "clock set back": set_clock_back,
        "two trainers": two_trainers,
    }


def attempt(trial: Trial, project: Path, scratch: Path, draw: random.Random) -> Outcome:
    """A trial on a copy of the project."""
    folder = copy(project, scratch / "broken")
    try:
        return trial(folder, draw)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _again(project: Path, stage: str, before: Mapping[str, str]) -> Outcome:
    ended = wait(project, start(project, stage))
    return _compared(project, stage, before) if ended.code == 0 else (FAULT, _last(ended))


def _compared(project: Path, stage: str, before: Mapping[str, str]) -> Outcome:
    now = results(project, stage)
    other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return (FAULT, f"other bytes: {', '.join(other)}") if other else (SAME, "")


def _last(ended: Ended) -> str:
    return f"exit code {ended.code}: {' '.join(ended.said.split())[-300:]}"


def _remove(project: Path, stage: str) -> None:
    """As DVC does before it starts a stage; not what is written into by several stages or by hand."""
    if stage not in ("documents", "report"):
        for name in STAGES[stage][1]:
            path = project / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _states(project: Path, row: str) -> list[Path]:
    return sorted((project / ".cache/resume" / row).glob("*.pt"))


def _interrupted(project: Path, stage: str, draw: random.Random) -> Path | None:
    """The state of a training killed after its first one; None if it has ended before."""
    _remove(project, stage)
    process = start(project, stage)
    end = time.monotonic() + PATIENCE
    known = set(_states(project, STAGES[stage][0]))
    while process.exitcode is None and time.monotonic() < end:
        if set(_states(project, STAGES[stage][0])) - known:
            break
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.1))
    kill_group(process)
    wait(project, process)
    found = _states(project, STAGES[stage][0])
    return max(found, key=lambda path: int(path.stem.partition("_")[2])) if found else None


def _damaged(content: bytes, how: str, draw: random.Random) -> bytes:
    if how == "half":
        return content[: len(content) // 2]
    if how == "empty":
        return b""
    at = draw.randrange(len(content))
    if how == "noise":
        noise = draw.randbytes(32)
        return content[:at] + noise + content[at + len(noise) :]
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


@contextmanager
def _small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """A folder that is a disk of its own, if this process may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
