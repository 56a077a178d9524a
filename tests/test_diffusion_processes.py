"""Diffusion on several processes: each does its share, and together they do what one does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from small_diffusion import JUDGE, dit, experiment, open_small
from small_project import said, together

from maskllm4v.checkpoints import save_dense
from maskllm4v.data import prepare
from maskllm4v.errors import ConfigError
from maskllm4v.layout import judge_file
from maskllm4v.tasks import open_task
from maskllm4v.tasks.diffusion import Diffusion

SAMPLES = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, and a judge that has learned nothing."""
    path = tmp_path_factory.mktemp("processes")
    prepare(experiment().data, path / "data")
    judge = judged(path).experiment.judge
    assert judge is not None
    save_dense(path / judge_file("dense"), open_task(judge, path / "data").build_model(0), judge.model.name)
    return path


def judged(place: Path) -> Diffusion:
    sections = {"task": {"judge": JUDGE, "eval_batch_size": 8}, "evaluation": {"samples": SAMPLES, "images": 25}}
    return open_small(place / "data", **sections)


def evaluate() -> None:
    torch.manual_seed(0)
    found = judged(Path()).evaluate(dit(), dit(1))
    Path(f"found-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(place: Path) -> None:
    found = []
    for processes in (1, 2):
        assert together(place, evaluate, processes=processes) == [0] * processes, said(place)
        found += [json.loads((place / f"found-{rank}.json").read_text()) for rank in range(processes)]
    one, first, second = found
    assert first == pytest.approx(second, rel=1e-6)
    assert {k: v for k, v in first.items() if k != "kd"} == pytest.approx(
        {k: v for k, v in one.items() if k != "kd"}, rel=1e-4
    )
    assert first["kd"] != 0  # its subsets are of samples in another order


def calibration(task: Diffusion, part: int) -> list[Tensor]:
    batches = list(task.calibration(7, 0)[part].batches)
    return [torch.cat(values) for values in zip(*batches, strict=True)]


def one_of(processes: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", processes), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("part", [0, 1], ids=["conditions", "images"])
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_a_calibration_make_the_whole(
    processes: int, part: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = open_small(place / "data")
    whole = calibration(task, part)
    for rank in range(processes):
        one_of(processes, rank, monkeypatch)
        for own, wanted in zip(calibration(task, part), whole, strict=True):
            assert torch.equal(own, wanted[rank::processes])


def test_fewer_images_than_processes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_of(31, 0, monkeypatch)
    with pytest.raises(ConfigError, match=r"data\.calibration is 30, fewer than the 31 processes"):
        calibration(open_small(place / "data"), 1)
