"""Batches as a function of the step, however they are divided, loaded and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import digits_settings, draw_folder, everything, folder_settings, open_digits, prepared, same
from torch import Tensor

from maskllm4v.data import ImageData, prepare
from maskllm4v.data.batches import StepBatches, plain_loader, step_loader
from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.sharding import WHOLE, BatchShard


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare(digits_settings(), folder)
    return folder


class Numbers:
    """Image i holds i, plus noise in [0, ½) if augmented."""

    def __init__(self, count: int) -> None:
        self.count = count

    def labels(self, split: str) -> Tensor:
        assert split == "train"
        return torch.arange(self.count) * 10

    def images(self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice) -> Tensor:
        assert split == "train"
        assert augment is not None
        return torch.from_numpy(indices + augment.random(len(indices)) / 2)[part].reshape(-1, 1, 1, 1)


def batches(count: int = 23, size: int = 5, seed: int = 0) -> StepBatches:
    return StepBatches(Numbers(count), seed=seed, batch_size=size)  # type: ignore[arg-type]


def test_batch_is_a_pure_function_of_the_step() -> None:
    first, other = batches(), batches()
    forwards = [first[step] for step in range(12)]
    backwards = [other[step] for step in reversed(range(12))][::-1]
    assert same(forwards, backwards)
    assert same(forwards, [first[step] for step in range(12)])


def test_seed_changes_order_and_augmentation() -> None:
    (a, la), (b, lb) = batches(seed=0)[0], batches(seed=1)[0]
    assert not torch.equal(la, lb)
    assert not torch.equal(a - a.floor(), b - b.floor())


@pytest.mark.parametrize(("count", "size"), [(23, 5), (20, 5), (5, 5), (7, 1)])
def test_no_image_twice_in_an_epoch(count: int, size: int) -> None:
    found = batches(count, size)
    assert found.steps_per_epoch == count // size
    epochs = []
    for epoch in range(4):
        items = [found[epoch * found.steps_per_epoch + i] for i in range(found.steps_per_epoch)]
        labels = torch.cat([labels for _, labels in items])
        seen = torch.cat([images for images, _ in items]).floor().long().flatten()
        assert torch.equal(seen * 10, labels)
        assert len(set(seen.tolist())) == len(seen) == count // size * size
        epochs.append(tuple(seen.tolist()))
    assert len(set(epochs)) > 1


def test_augmentation_is_new_each_epoch() -> None:
    found, seen = batches(4, 4), []
    for step in range(3):
        images = found[step][0].flatten()
        seen.append(images.sort().values.tolist())
    assert len({value for values in seen for value in values}) == 12


def test_loader_gives_the_steps_asked_for() -> None:
    data, found = Numbers(23), batches(seed=2)
    got = list(step_loader(data, seed=2, batch_size=5, steps=9))  # type: ignore[arg-type]
    assert same(got, [found[step] for step in range(9)])


@pytest.mark.parametrize("start", [0, 3, 4, 8, 9])
def test_resumed_run_is_the_tail_of_an_uninterrupted_one(digits_folder: Path, start: int) -> None:
    data = open_digits(digits_folder, shift=1, shift_probability=0.5)
    whole = list(step_loader(data, seed=2, batch_size=224, steps=9))
    assert same(list(step_loader(data, seed=2, batch_size=224, steps=9, start=start)), whole[start:])


def test_workers_change_no_bit(digits_folder: Path) -> None:
    data = open_digits(digits_folder, shift=1, shift_probability=0.5)
    runs = [list(step_loader(data, seed=1, batch_size=300, steps=5, start=1, workers=n)) for n in (0, 2)]
    assert len(runs[0]) == 4
    assert same(*runs)


@pytest.mark.parametrize("size", [899, 10_000])
def test_batch_larger_than_the_split_raises(digits_folder: Path, size: int) -> None:
    with pytest.raises(DataError, match=rf"batch_size is {size}, .* 898 images"):
        next(step_loader(open_digits(digits_folder), seed=0, batch_size=size, steps=1))


# Divided


STEPS, SIZE = 3, 4
SHARES = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]


@pytest.fixture(params=["digits", "in memory", "decoded"])
def source(request: pytest.FixtureRequest, digits_folder: Path, tmp_path: Path) -> ImageData:
    """Augmented images of each kind."""
    if request.param == "digits":
        return open_digits(digits_folder, shift=2, shift_probability=0.5)
    root = draw_folder(tmp_path / "pets")
    if request.param == "in memory":
        settings = folder_settings(root, in_memory=32)
        return prepared(settings, tmp_path / "m", shift=4, shift_probability=0.5, hflip=0.5)
    return prepared(folder_settings(root), tmp_path / "m", hflip=0.5, random_erasing=0.5, auto_augment="rand-m8-inc1")


def joined(data: ImageData, processes: int, micro_batches: int, **how: Any) -> list[tuple[Tensor, Tensor]]:
    """The global batches that processes and their micro-batches make together."""
    loaders = [
        step_loader(data, seed=1, batch_size=SIZE, shard=BatchShard.of(rank, processes, micro_batches), **how)
        for rank in range(processes)
    ]
    steps = range(how.get("start", 0), how["steps"])
    batches = []
    for _ in steps:
        parts = [next(loader) for loader in loaders for _ in range(micro_batches)]
        assert {len(part[1]) for part in parts} == {SIZE // processes // micro_batches}
        images, labels = zip(*parts, strict=True)
        batches.append((torch.cat(images), torch.cat(labels)))
    assert all(not list(loader) for loader in loaders)
    return batches


@pytest.mark.parametrize(("processes", "micro_batches"), SHARES)
def test_division_changes_no_bit(source: ImageData, processes: int, micro_batches: int) -> None:
    whole = list(step_loader(source, seed=1, batch_size=SIZE, steps=STEPS))
    assert same(joined(source, processes, micro_batches, steps=STEPS), whole)
    assert same(joined(source, processes, micro_batches, steps=STEPS, start=1), whole[1:])


def test_division_workers_and_resuming_together_change_no_bit(source: ImageData) -> None:
    whole = list(step_loader(source, seed=1, batch_size=SIZE, steps=STEPS))
    assert same(joined(source, 2, 2, steps=STEPS, start=1, workers=2), whole[1:])


@pytest.mark.parametrize(("processes", "micro_batches"), SHARES)
def test_shares_are_all_parts_once(processes: int, micro_batches: int) -> None:
    shares = [BatchShard.of(rank, processes, micro_batches) for rank in range(processes)]
    assert [part for share in shares for part in share.parts] == list(range(processes * micro_batches))
    assert {share.count for share in shares} == {processes * micro_batches}
    assert BatchShard.of(0, 1, 1) == WHOLE


@pytest.mark.parametrize(("size", "processes", "micro_batches"), [(5, 2, 1), (6, 1, 4), (6, 2, 2), (2, 3, 1)])
def test_indivisible_batch_is_a_config_error(size: int, processes: int, micro_batches: int) -> None:
    shard = BatchShard.of(0, processes, micro_batches)
    with pytest.raises(ConfigError, match=rf"batch_size is {size}, which {shard.count} processes"):
        StepBatches(Numbers(23), seed=0, batch_size=size, shard=shard)  # type: ignore[arg-type]


# Plain


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_batches_are_in_order_and_complete(digits_folder: Path, workers: int) -> None:
    data, indices = open_digits(digits_folder, shift=2), np.array([5, 3, 800, 3, 0])
    found = list(plain_loader(data, "test", indices, 2, workers))
    assert [len(labels) for _, labels in found] == [2, 2, 1]
    images, labels = (torch.cat(part) for part in zip(*found, strict=True))
    assert torch.equal(images, everything(data, "test")[indices])
    assert torch.equal(labels, data.labels("test")[indices])
    assert not list(plain_loader(data, "test", indices[:0], 2, workers))
