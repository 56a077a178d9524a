"""Diffusion on several processes: each does its share, and together they do what one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from small_diffusion import JUDGE, dit, experiment, open_small
from small_project import said, together

from maskllm4v.checkpoints.masks import save_dense
from maskllm4v.data import prepare
from maskllm4v.runs.paths import judge_file
from maskllm4v.tasks.diffusion.task import Diffusion
from maskllm4v.utils.distributed import rows_of_all
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.processes import rank, world_size

SAMPLES = 31  # not the same number for two processes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, and a judge that has learned nothing."""
    path = tmp_path_factory.mktemp("processes")
    prepare(experiment().data, path / "data")
    judge = judged(path).judge
    assert judge is not None
    save_dense(path / judge_file("dense"), judge.task.build_model(0), judge.model)
    return path


def judged(place: Path) -> Diffusion:
    sections = {"task": {"judge": JUDGE, "eval_batch_size": 8}, "evaluation": {"samples": SAMPLES, "images": 25}}
    return open_small(place / "data", **sections)


def evaluate() -> None:
    found = judged(Path()).evaluate(dit(), dit(1))
    Path(f"found-{rank()}.json").write_text(json.dumps(found))


def by_each(place: Path, function: Callable[..., None], *arguments: Any, processes: int) -> list[Path]:
    """What each process leaves behind under ``found-<rank>``."""
    for path in place.glob("found-*"):
        path.unlink()
    assert together(place, function, *arguments, processes=processes) == [0] * processes, said(place)
    return [next(place.glob(f"found-{number}.*")) for number in range(processes)]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(place: Path) -> None:
    one, first, second = (
        json.loads(path.read_text()) for n in (1, 2) for path in by_each(place, evaluate, processes=n)
    )
    assert first == second
    assert {"eps_mse", "dense_mse", "accuracy", "fd", "kd"} <= first.keys()
    assert first["accuracy"] == one["accuracy"]
    assert first == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert abs(one["kd"]) > 1e-4


# All processes' rows


def gather(count: int) -> None:
    """Rows that say their number, as the processes have them."""
    whole = torch.arange(3.0 * count).view(count, 3) + 0.1
    found = rows_of_all(whole[rank() :: world_size()].clone(), count)
    assert torch.equal(found, whole)
    torch.save(found, f"found-{rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "count"), [(1, 3), (2, 4), (2, 5), (2, 1), (3, 2), (2, 0)])
def test_rows_of_all_processes_in_their_order(processes: int, count: int, tmp_path: Path) -> None:
    for path in by_each(tmp_path, gather, count, processes=processes):
        assert torch.load(path).shape == (count, 3)


def test_one_process_has_all_rows() -> None:
    rows = torch.randn(3, 2)
    assert rows_of_all(rows, 3) is rows


# The bank


def make_bank(samples: int) -> None:
    bank = {"samples": samples, "sampler": "ddim", "steps": 2, "guidance": 1.0}
    task, seen = open_small(Path("data"), task={"bank": bank, "eval_batch_size": 4}), 0

    def note(module: object, inputs: tuple[Tensor]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    model = dit()
    model.register_forward_pre_hook(note)
    made = task.generated(model, 5).source
    found = made.images("train", np.arange(samples), None), made.labels("train"), torch.tensor(seen)
    torch.save(found, f"found-{rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("samples", [9, 1])
def test_bank_is_shared_out_and_whole_in_each_process(samples: int, place: Path) -> None:
    one, first, second = (torch.load(path) for n in (1, 2) for path in by_each(place, make_bank, samples, processes=n))
    assert first[0].shape == (samples, 1, 8, 8)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], one[0], rtol=1e-3, atol=1e-3)  # batches of others sum in another order
    for found in (first, second):
        assert torch.equal(found[1], one[1])
    half = samples // 2
    assert [found[2].item() for found in (one, first, second)] == [2 * samples, 2 * (samples - half), 2 * half]


# Calibration


def calibration(task: Diffusion, part: int) -> list[Tensor]:
    batches = list(task.calibration(7, 0)[part].batches)
    return [torch.cat(values) for values in zip(*batches, strict=True)]


def one_of(processes: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", processes), ("RANK", number), ("LOCAL_RANK", number)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("part", [0, 1], ids=["conditions", "images"])
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_a_calibration_make_the_whole(
    processes: int, part: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = open_small(place / "data")
    whole = calibration(task, part)
    for number in range(processes):
        one_of(processes, number, monkeypatch)
        for own, wanted in zip(calibration(task, part), whole, strict=True):
            assert torch.equal(own, wanted[number::processes])


def test_fewer_images_than_processes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_of(31, 0, monkeypatch)
    with pytest.raises(ConfigError, match=r"data\.calibration is 30, fewer than the 31 processes"):
        calibration(open_small(place / "data"), 1)
