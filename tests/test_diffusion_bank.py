"""Samples of the dense model in the place of data: what is learned and calibrated from them, measured on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from small_diffusion import assert_same_images, clean, dit, experiment, open_small, parts, same

from maskllm4v.data import prepare
from maskllm4v.tasks.diffusion.noising import NoisyBatch
from maskllm4v.tasks.diffusion.task import Diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare(experiment().data, path)
    return path


@pytest.fixture
def task(folder: Path) -> Diffusion:
    return open_small(folder)


def everything(made: Diffusion) -> Tensor:
    return made.source.images("train", np.arange(made.settings.bank.samples), None)


def places(batch: NoisyBatch, samples: Tensor) -> list[int]:
    """Which samples a batch is of: the nearest ones, and no other is near."""
    distances = (samples[:, None].double() - clean(batch)[None]).abs().amax((2, 3, 4))
    nearest, second = distances.topk(2, 0, largest=False).values
    assert (10 * nearest < second).all()
    return distances.argmin(0).tolist()


def calibrated(made: Diffusion, seed: int = 0) -> NoisyBatch:
    batches = list(parts(made, seed=seed)[1].batches)
    return NoisyBatch(*(torch.cat(values) for values in zip(*batches, strict=True)))


def test_generated_task_learns_from_what_the_model_makes(task: Diffusion) -> None:
    dense = dit()
    made = task.generated(dense, 5)
    bank, settings = made.source, task.settings.bank
    assert (settings.samples, settings.guidance) == (24, 1.0)
    labels = torch.arange(24) % 10
    assert torch.equal(bank.labels("train"), labels)
    wanted = task.sampler(settings)(dense, labels, range(24), seed=5, purpose="bank")
    torch.testing.assert_close(everything(made), wanted)
    assert made.steps_per_epoch(8) == 3
    (batch,) = made.train_batches(seed=0, batch_size=24, steps=1)
    order = places(batch, wanted)
    assert sorted(order) == list(range(24)) != order
    assert_same_images(clean(batch), wanted[order].double(), batch)
    shown = batch.labels != 10
    assert torch.equal(batch.labels[shown], labels[order][shown])
    assert task.source is task.data  # as it was


def test_generated_calibration_is_of_the_samples(task: Diffusion) -> None:
    made = task.generated(dit(), 5)
    whole = calibrated(made)
    order = places(whole, everything(made))
    assert sorted(order) == list(range(24))  # all that there are, though 30 images would calibrate
    shown = whole.labels != 10
    assert shown.sum() > 15
    assert torch.equal(whole.labels[shown], (torch.arange(24) % 10)[order][shown])
    assert_same_images(clean(whole), everything(made)[order].double(), whole)
    assert same(list(parts(made)[0].batches), list(parts(task)[0].batches))


def test_samples_that_calibrate_are_drawn_from_the_whole_bank(folder: Path) -> None:
    """The first ones would be of the first classes, where there are more of these than samples to calibrate with."""
    made = open_small(folder, task={"bank": {"samples": 200, "sampler": "ddim", "steps": 2}}).generated(dit(), 5)
    first, again, other = (places(calibrated(made, seed), everything(made)) for seed in (0, 0, 1))
    for chosen in (first, other):
        assert len(set(chosen)) == len(chosen) == 30
        assert min(np.histogram(chosen, 4, (0, 200))[0]) >= 2
    assert first == again
    assert set(first) != set(other)


def test_samples_are_the_same_for_the_same_seed(folder: Path) -> None:
    def made(seed: int, **sections: Any) -> Tensor:
        return everything(open_small(folder, **sections).generated(dit(), seed))

    assert torch.equal(made(0), made(0))
    # Other batches sum in another order, and the first step divides by √ᾱ of pure noise, 0.006.
    torch.testing.assert_close(made(0, task={"eval_batch_size": 5}), made(0), rtol=1e-3, atol=1e-3)
    assert not torch.equal(made(0), made(1))


def test_samples_are_made_in_the_precision_of_evaluation(task: Diffusion, folder: Path) -> None:
    seen: list[bool] = []
    model = dit()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    whole = task.generated(model, 5)
    half = open_small(folder, task={"eval_amp": "bf16"}).generated(model, 5)
    assert seen == [False] * 2 + [True] * 2
    assert everything(half).dtype == torch.float32
    assert not torch.equal(everything(half), everything(whole))


def test_generated_task_is_evaluated_on_real_images(task: Diffusion) -> None:
    model, dense = dit(), dit(1)
    assert task.generated(dense, 5).evaluate(model, dense) == task.evaluate(model, dense)
