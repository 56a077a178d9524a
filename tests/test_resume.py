"""Interrupted trainings: killed for real, started again, and bit-identical to ones never interrupted."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pipeline import new_project
from small_project import (
    EVERY,
    LONG,
    STEPS,
    Death,
    Params,
    begun,
    copied,
    ends,
    gone,
    ready_project,
    results,
    run_stage,
    said,
    saved_steps,
    stage_in,
    stage_of,
    started,
    states,
    steps,
    stopped,
    tell,
    tiny_params,
    together,
    until,
    write_params,
)

from maskllm4v.config import parse_experiment
from maskllm4v.training.resume import KEPT, Resume
from maskllm4v.utils.errors import CheckpointError

pytestmark = pytest.mark.slow

TRAININGS = ["tiny-dense", "tiny-averaged", "tiny-distilled", "tiny-tuned"]
Whole = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ready_project(tmp_path_factory.mktemp("inputs"), tiny_params())


@pytest.fixture
def project(inputs: Path, tmp_path: Path) -> Path:
    return copied(inputs, tmp_path / "project")


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Gives the results of a training that nobody interrupted, by row and number of processes."""
    found: dict[tuple[str, int], dict[str, str]] = {}

    def get(row: str, processes: int = 1) -> dict[str, str]:
        if (row, processes) not in found:
            folder = copied(inputs, tmp_path_factory.mktemp("whole") / "project")
            assert run_stage(folder, stage_of(row), row, processes) == [0] * processes, said(folder)
            assert steps(folder) == list(range(STEPS))
            found[row, processes] = results(folder, row)
        return found[row, processes]

    return get


# At a given step

DEATHS = {
    1: [
        (Death(3), 0),  # before the first state
        (Death(9), 5),  # just before the second
        (Death(11, "term"), 12),  # no multiple of anything
        (Death(16), 15),
        (Death(STEPS - 1, "term"), STEPS),  # all is done but for the results
    ],
    2: [(Death(9), 5), (Death(11, "term"), 12), (Death(STEPS - 1), 20)],
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("row", TRAININGS)
def test_interrupted_again_and_again(row: str, processes: int, project: Path, whole: Whole) -> None:
    """SIGKILL and SIGTERM, in one process and in two; each start goes on from the last state."""
    stage, first = stage_of(row), 0
    for death, saved in DEATHS[processes]:
        codes = run_stage(project, stage, row, processes, death)
        if death.how == "kill":
            assert codes == [-signal.SIGKILL] * processes, said(project)
        else:
            assert codes[0] == 128 + signal.SIGTERM, said(project)
            assert all(codes)
        assert steps(project) == list(range(first, death.step + 1))
        assert saved_steps(project, row) == ([saved] if saved else [])
        first = saved
    assert run_stage(project, stage, row, processes) == [0] * processes, said(project)
    assert steps(project) == list(range(first, STEPS))
    assert results(project, row) == whole(row, processes)
    assert states(project, row) == []


def test_two_processes_are_no_repetition_of_one(whole: Whole) -> None:
    assert whole("tiny-averaged", 1) != whole("tiny-averaged", 2)


@pytest.mark.parametrize("row", ["tiny-averaged", "tiny-tuned"])
def test_killed_while_a_state_is_written(row: str, project: Path, whole: Whole) -> None:
    """The state before is still there, whole; the half one is swept away by the next."""
    assert run_stage(project, stage_of(row), row, dies=Death(2 * EVERY - 1, "writing")) == [-signal.SIGKILL]
    assert saved_steps(project, row) == [EVERY]
    half, state = states(project, row)
    assert half.suffix == ".part"
    assert 0 < half.stat().st_size < state.stat().st_size
    steps(project)
    assert run_stage(project, stage_of(row), row, dies=Death(12)) == [-signal.SIGKILL]
    assert steps(project) == list(range(EVERY, 13))
    assert [path.suffix for path in states(project, row)] == [".pt"]
    assert run_stage(project, stage_of(row), row) == [0]
    assert results(project, row) == whole(row)


def test_masks_on_updated_weights(inputs: Path, tmp_path: Path) -> None:
    """The second start finds the updated weights and the dense teacher again, neither of which is in the state."""
    params, row = tiny_params(), "tiny-hybrid"
    hybrid = {"prior": "tiny-squares", "weights": "updated", "distillation": 1.0}
    params["learned"][row] = {**params["learned"]["tiny-averaged"], **hybrid}
    params["rows"][row] = row
    project = copied(inputs, tmp_path / "project", params)
    assert run_stage(project, "update", "tiny-squares") == [0], said(project)
    uninterrupted = copied(project, tmp_path / "uninterrupted")
    assert run_stage(project, "train", row, dies=Death(16)) == [-signal.SIGKILL], said(project)
    assert saved_steps(project, row) == [15]
    assert steps(project) == list(range(17))
    assert run_stage(project, "train", row) == [0], said(project)
    assert steps(project) == list(range(15, STEPS))
    assert run_stage(uninterrupted, "train", row) == [0], said(uninterrupted)
    assert steps(uninterrupted) == list(range(STEPS))
    assert results(project, row) == results(uninterrupted, row)


@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_two_processes_is_killed(lost: int, project: Path, whole: Whole) -> None:
    """The other one fails with it instead of waiting, and both go on together."""
    codes = together(project, _dies_alone, "tiny-averaged", lost, processes=2)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] not in (0, -signal.SIGKILL)
    assert saved_steps(project, "tiny-averaged") == [10]
    steps(project)
    assert run_stage(project, "train", "tiny-averaged", 2) == [0, 0], said(project)
    assert steps(project) == list(range(10, STEPS))
    assert results(project, "tiny-averaged") == whole("tiny-averaged", 2)


def _dies_alone(row: str, lost: int) -> None:
    stage_in(stage_of(row), row, Death(12) if os.environ["RANK"] == str(lost) else None)


def test_every_process_has_to_see_the_state(project: Path, inputs: Path, tmp_path: Path) -> None:
    assert run_stage(project, "train", "tiny-averaged", 2, Death(9)) == [-signal.SIGKILL] * 2
    elsewhere = copied(inputs, tmp_path / "elsewhere")
    codes = together([project, elsewhere], stage_in, "train", "tiny-averaged", None, processes=2)
    assert all(codes)
    assert said(elsewhere, 1).endswith(
        "train tiny-averaged: process 1 does not see the saved state; all need one shared folder\n"
    )


# What lies on the disk


@pytest.mark.parametrize("row", ["tiny-averaged", "tiny-distilled"])
def test_states_hold_no_frozen_weights(row: str, project: Path) -> None:
    """Logits, their average and the best ones, two moments, and a little."""
    assert run_stage(project, "train", row, dies=Death(STEPS - 1, "term")) == [128 + signal.SIGTERM]
    (path,) = states(project, row)
    state = torch.load(path, weights_only=True)["state"]
    assert set(state) == {"step", "tensors", "optimizer", "scaler", "learner"}
    assert set(state["learner"]) == {"average", "best", "curve"}
    logits = [tuple(tensor.shape) for tensor in state["tensors"]]
    assert all(candidates == 6 for candidates, _ in logits)
    copies = 5 if row == "tiny-averaged" else 3
    size = 4 * sum(candidates * groups for candidates, groups in logits)
    assert path.stat().st_size < 1.5 * copies * size
    layers = {(groups * 4 // width, width) for _, groups in logits for width in (32, 128)}
    assert not layers & {tuple(tensor.shape) for tensor in _tensors(state)}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def changed(lr: float) -> Params:
    params = tiny_params()
    params["learned"]["tiny-averaged"]["lr"] = lr
    return params


def state_file(folder: Path, params: Params) -> Path:
    """Where the state of these settings lies, if only they have one."""
    row = "tiny-averaged"
    assert parse_experiment(params, "test").row(row).kind == "learned"
    write_params(folder, params)
    assert run_stage(folder, "train", row, dies=Death(7)) == [-signal.SIGKILL], said(folder)
    return max(states(folder, row), key=lambda path: path.stat().st_mtime_ns)


def test_states_of_other_settings(project: Path) -> None:
    """Never picked up, kept for a while (a change may be taken back), and refused where one is put in the way."""
    paths = []
    for lr in (0.01, 0.02, 0.03):
        paths.append(state_file(project, changed(lr)))
        assert steps(project) == list(range(8))
    assert len(set(paths)) == 3
    assert states(project, "tiny-averaged") == sorted(paths[-KEPT:])
    paths[2].write_bytes(paths[1].read_bytes())
    assert run_stage(project, "train", "tiny-averaged") == [1]
    error = f"train tiny-averaged: {paths[2].relative_to(project)} belongs to a training of other settings;"
    assert said(project).startswith(error)
    assert said(project).count("\n") == 1
    write_params(project, changed(0.02))
    assert run_stage(project, "train", "tiny-averaged") == [0]
    assert steps(project) == list(range(EVERY, STEPS))
    assert states(project, "tiny-averaged") == []


class Malice:
    """What a pickle can hold."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch malice",)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "no archive": lambda content: b"\x00" * len(content),
    "a bit in a tensor": lambda content: flipped(content, len(content) // 2),
    "a bit in what is not tensors": lambda content: flipped(content, content.index(b"step")),
    "code": lambda content: pickle.dumps(Malice()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resume = Resume(Path("row"), 3, {"lr": 0.1})
    assert resume.load(torch.device("cpu")) is None
    resume.save({"step": 7, "tensors": [torch.randn(500), torch.randn(40)]})
    found = resume.load(torch.device("cpu"))
    assert found is not None
    assert found["step"] == 7
    resume.path.write_bytes(DAMAGE[damage](resume.path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"^row/seed3-\w+\.pt is damaged \(.+\); delete it to start from"):
        resume.load(torch.device("cpu"))
    assert not (tmp_path / "malice").exists()


def test_code_in_a_state_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resume = Resume(Path(), 3, {"lr": 0.1})
    torch.save({"digest": resume.digest, "state": Malice()}, resume.path)
    with pytest.raises(CheckpointError, match="is damaged"):
        resume.load(torch.device("cpu"))
    assert not (tmp_path / "malice").exists()


# From outside, while a stage's own command runs


@pytest.fixture(scope="module")
def pinned(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Path]:
    """Settings of an exact experiment of two seeds, which are trained side by side; its dense model."""
    params = tiny_params()
    params |= {"exact": True, "seeds": [0, 1]}
    params["dense"] |= {"steps": LONG}
    params["model"]["fused_attention"] = False
    folder = copied(inputs, tmp_path_factory.mktemp("pinned") / "project", params)
    assert ends(started(folder, *DENSE)) == 0, said(folder)
    return params, folder


DENSE = (sys.executable, "-m", "stages.dense", "tiny-dense")


def test_seeds_side_by_side(pinned: tuple[Params, Path], inputs: Path, tmp_path: Path) -> None:
    """When their main process is killed or told to end, alone, they save and end; no orphan stays."""
    folder = copied(inputs, tmp_path / "project", pinned[0])
    with stopped(folder, "tiny-dense", 2, *DENSE) as (running, (main, *children)):
        assert len(children) == 2
        main.kill()
    assert ends(running) == -signal.SIGKILL
    until(lambda: gone(children))
    assert max(saved_steps(folder, "tiny-dense")) < LONG

    with stopped(folder, "tiny-dense", 2, *DENSE) as (running, (main, *children)):
        tell(main, signal.SIGTERM)
    assert ends(running) == 128 + signal.SIGTERM, said(folder)
    assert gone(children)
    assert max(saved_steps(folder, "tiny-dense")) < LONG

    with stopped(folder, "tiny-dense", 2, *DENSE) as (running, (_, child, _)):
        child.kill()
    assert ends(running) == 1
    assert said(folder).strip() == "dense tiny-dense: a process that computed a seed was killed (out of memory?)"

    assert ends(begun(folder, "tiny-dense", 2, *DENSE)) == 0, said(folder)
    assert results(folder, "tiny-dense") == results(pinned[1], "tiny-dense")


def test_dvc_repro_after_a_kill(pinned: tuple[Params, Path], tmp_path: Path) -> None:
    """All of it killed, and the same command again."""
    folder = new_project(tmp_path, pinned[0])
    command = ("dvc", "repro", "dense@tiny-dense")
    with stopped(folder, "tiny-dense", 2, *command) as (running, everything):
        assert len(everything) >= 4
        os.killpg(running.pid, signal.SIGKILL)
    assert ends(running) == -signal.SIGKILL
    until(lambda: gone(everything))
    assert max(saved_steps(folder, "tiny-dense")) < LONG
    assert ends(begun(folder, "tiny-dense", 2, *command)) == 0, said(folder)
    assert "Running stage 'dense@tiny-dense'" in said(folder)
    assert "dense@tiny-dense" in (folder / "dvc.lock").read_text()
    assert results(folder, "tiny-dense") == results(pinned[1], "tiny-dense")
    assert not (folder / ".cache/resume/tiny-dense").exists()
