"""What somebody tried on trainings: DVC killed alone, two trainers of a row, full disks, a clock set back."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from small_pipeline import new_project
from small_project import (
    EVERY,
    Params,
    begun,
    copied,
    ends,
    family,
    gone,
    ready_project,
    results,
    run_stage,
    said,
    saved_steps,
    started,
    states,
    tiny_params,
    until,
)

from maskllm4v.training.resume import Resume
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.locks import held

ROW = "tiny-averaged"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ready_project(tmp_path_factory.mktemp("inputs"), tiny_params())


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The results of a training that nothing happened to."""
    folder = copied(inputs, tmp_path_factory.mktemp("whole") / "project")
    assert run_stage(folder, "train", ROW) == [0], said(folder)
    return results(folder, ROW)


@pytest.fixture
def project(inputs: Path, tmp_path: Path) -> Path:
    return copied(inputs, tmp_path / "project")


# DVC, killed alone


def long(steps: int = 2000) -> Params:
    params = tiny_params() | {"exact": False}
    params["dense"]["steps"] = steps
    return params


@pytest.mark.slow
def test_a_stage_ends_with_its_dvc(tmp_path: Path) -> None:
    """dash stays between DVC and the stage; bash does not. The state is saved, and nobody holds the row."""
    program = shutil.which("dash") or "/bin/sh"
    folder = new_project(tmp_path, long())
    running = begun(folder, "tiny-dense", 1, "env", f"SHELL={program}", "dvc", "repro", "dense@tiny-dense")
    everything = family(running)
    stage = next(one for one in everything if one.name().startswith("python") and "stages.dense" in one.cmdline())
    psutil.Process(running.pid).kill()
    assert ends(running) == -signal.SIGKILL
    until(lambda: gone([stage]))
    until(lambda: gone(everything))
    (saved,) = saved_steps(folder, "tiny-dense")
    assert 0 < saved < 2000
    with held(folder / ".cache/resume/tiny-dense.lock", "free"):
        pass


@pytest.mark.slow
def test_what_a_person_starts_does_not_end_with_its_shell(tmp_path: Path, inputs: Path) -> None:
    folder = copied(inputs, tmp_path / "project", long())
    shell = started(folder, "sh", "-c", f"nohup {sys.executable} -m stages.dense tiny-dense & wait")
    until(lambda: saved_steps(folder, "tiny-dense"))
    (stage,) = family(shell)[1:]
    shell.kill()
    ends(shell)
    (before,) = saved_steps(folder, "tiny-dense")
    until(lambda: saved_steps(folder, "tiny-dense")[0] >= before + 8 * EVERY)
    assert stage.is_running()
    stage.kill()


@pytest.mark.slow
def test_a_second_trainer_is_refused(tmp_path: Path, inputs: Path) -> None:
    """By name, as long as the first one or a process of it lives; one that was killed is in nobody's way."""
    folder = copied(inputs, tmp_path / "project", long())
    first = begun(folder, "tiny-dense", 1, sys.executable, "-m", "stages.dense", "tiny-dense")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "stages.dense", "tiny-dense"]
    second = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert re.fullmatch(
        rf"dense tiny-dense: row 'tiny-dense' is trained by process {first.pid} on \S+ already; wait for it, or end it",
        second.stderr.strip(),
    )
    first.kill()
    ends(first)
    assert (folder / ".cache/resume/tiny-dense.lock").exists()
    (before,) = saved_steps(folder, "tiny-dense")
    third = begun(folder, "tiny-dense", 1, *command)
    assert saved_steps(folder, "tiny-dense")[0] > before
    third.terminate()
    assert ends(third) == 128 + signal.SIGTERM
    assert not (folder / ".cache/resume/tiny-dense.lock").exists()


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "row.lock"
    with held(path, "row 'x' is trained"):
        refused = pytest.raises(UserError, match=rf"^row 'x' is trained by process {os.getpid()} on \S+ already")
        with refused, held(path, "row 'x' is trained"):
            raise AssertionError("both hold it")
        assert path.exists()
    assert list(path.parent.iterdir()) == []
    path.write_text("process 1 on elsewhere")  # of a dead process
    with held(path, "row 'x' is trained"):
        pass
    (tmp_path / "file").touch()
    with held(tmp_path / "file" / "row.lock", "row 'x' is trained"):
        assert "no lock (" in capsys.readouterr().err


# Clocks


def state(step: int) -> dict[str, Any]:
    return {"step": step, "tensors": [torch.full((8,), float(step))]}


def test_a_clock_set_back_costs_no_state(tmp_path: Path) -> None:
    """States of other settings come from the future; what is saved now stays, and is what a training goes on from."""
    settings = [Resume(tmp_path, 3, {"lr": lr}) for lr in (0.1, 0.2, 0.3)]
    for resume in settings[:2]:
        resume.save(state(7))
        os.utime(resume.path, (2**32, 2**32))
    newest = settings[2]
    for step in (5, 10, 15):
        newest.save(state(step))
        os.utime(newest.path, (step, 40 - step))  # each older than the one before
        found = Resume(tmp_path, 3, {"lr": 0.3}).load(CPU)
        assert found is not None
        assert found["step"] == step
    assert len(list(tmp_path.iterdir())) == 2
    assert settings[1].load(CPU) is not None  # saved after the first's
    assert settings[0].load(CPU) is None


def test_killed_between_a_state_and_the_removal_of_the_one_before(tmp_path: Path) -> None:
    resume = Resume(tmp_path, 3, {"lr": 0.1})
    resume.save(state(5))
    before = (resume.path, resume.path.read_bytes())
    resume.save(state(10))
    before[0].write_bytes(before[1])
    os.utime(before[0], (2**32, 2**32))
    found = resume.load(CPU)
    assert found is not None
    assert found["step"] == 10
    resume.save(state(15))
    assert list(tmp_path.iterdir()) == [resume.path]


# Full disks


class Full:
    """``torch.save`` on a disk that is full while it says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, save = False, torch.save

        def saving(value: Any, path: Path) -> None:
            if self.now:
                path.write_bytes(b"half")
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nand more")
            save(value, path)

        monkeypatch.setattr(torch, "save", saving)


def test_a_state_that_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each time that the disk is full, however often a state is due; the last good one stays."""
    full, resume = Full(monkeypatch), Resume(tmp_path, 3, {"lr": 0.1})
    resume.save(state(5))
    full.now = True
    for step in (10, 15):
        resume.save(state(step))
    assert re.fullmatch(
        r"\S+seed3-\w+\.pt cannot be saved, so the state before stays "
        r"\(PytorchStreamWriter .*; \d+ MiB are free there\)",
        capsys.readouterr().err.strip(),
    )
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]
    found = resume.load(CPU)
    assert found is not None
    assert found["step"] == 5
    full.now = False
    resume.save(state(20))
    full.now = True
    resume.save(state(25))
    assert capsys.readouterr().err.count("\n") == 1
    found = resume.load(CPU)
    assert found is not None
    assert found["step"] == 20


@pytest.fixture
def small_disk(project: Path) -> Iterator[Path]:
    """The project, with a disk of 256 KiB for its states and for its timings."""
    mounted = []
    for name in ("resume", "timings"):
        place = project / ".cache" / name
        place.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount")
        mounted.append(place)
    yield project
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 100 * 1024])
def test_a_full_disk_ends_no_training(left: int, small_disk: Path, whole: dict[str, str]) -> None:
    """Neither one for states nor one for timings; with some room left, a state is cut short."""
    for name, room in (("resume", left), ("timings", 0)):
        with (small_disk / ".cache" / name / "filler").open("wb", 0) as file:
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
            file.truncate(file.tell() - room)
    assert run_stage(small_disk, "train", ROW) == [0], said(small_disk)
    lines = said(small_disk).splitlines()
    assert any("cannot be saved, so the state before stays (" in line for line in lines), lines
    assert all(re.search(r"cannot be saved|^cannot write \.cache/timings/|no lock \(", line) for line in lines), lines
    assert results(small_disk, ROW) == whole


def test_timings_that_cannot_be_written(project: Path, whole: dict[str, str]) -> None:
    (project / ".cache").mkdir(exist_ok=True)
    (project / ".cache/timings").touch()
    assert run_stage(project, "train", ROW) == [0], said(project)
    assert all(line.startswith("cannot write .cache/timings/") for line in said(project).splitlines())
    assert results(project, ROW) == whole
    assert states(project, ROW) == []
