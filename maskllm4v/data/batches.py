"""Training batches as a pure function of the global step."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskllm4v.data import ImageData
from maskllm4v.utils.errors import ConfigError, DataError, UserError
from maskllm4v.utils.rng import generator
from maskllm4v.utils.sharding import WHOLE, BatchShard

GRACE = 60  # seconds that a loader's worker goes on after SIGTERM, if nobody ends it before


class Samples(Protocol):
    """What batches are made of; :class:`~maskllm4v.data.annotated.AnnotatedData` is one."""

    def count(self, split: str) -> int:
        """How many samples a split has."""

    def batch(self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = ...) -> Any:
        """The samples ``indices[part]``, augmented if a generator is given."""


class Labelled:
    """Samples of images with labels: ``[B, C, H, W]`` and ``[B]``."""

    def __init__(self, data: ImageData) -> None:
        self._data, self._labels = data, dict[str, Tensor]()

    def count(self, split: str) -> int:
        return len(self.labels(split))

    def labels(self, split: str) -> Tensor:
        if split not in self._labels:
            self._labels[split] = self._data.labels(split)
        return self._labels[split]

    def batch(
        self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        return self._data.images(split, indices, augment, part), self.labels(split)[indices[part]]


class StepBatches(Dataset[Any]):
    """Item ``step * shard.parts + i`` is the i-th part of a step's batch.

    Every epoch is a new permutation of the training split, its incomplete last batch dropped. Order and
    augmentation depend on (seed, epoch) and (seed, step) only, so neither the number of loader workers,
    of processes and micro-batches, nor the step a run was resumed at changes a single image.
    """

    def __init__(self, data: ImageData | Samples, *, seed: int, batch_size: int, shard: BatchShard = WHOLE) -> None:
        self.samples, self.seed, self.batch_size, self.shard = _samples(data), seed, batch_size, shard
        self.count = self.samples.count("train")
        self.steps_per_epoch = self.count // batch_size
        if not self.steps_per_epoch:
            raise DataError(f"batch_size is {batch_size}, but the training split has {self.count} images")
        if batch_size % shard.count:
            raise ConfigError(
                f"batch_size is {batch_size}, which {shard.count} processes × micro-batches do not divide"
            )

    def __getitem__(self, item: int) -> Any:
        step, i = divmod(item, len(self.shard.parts))
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.count)
        indices = order[position * self.batch_size : (position + 1) * self.batch_size]
        size = self.batch_size // self.shard.count
        first = self.shard.parts[i] * size
        part = slice(first, first + size)
        return self.samples.batch("train", indices, generator(self.seed, "augment", step), part)


def _samples(data: ImageData | Samples) -> Samples:
    return Labelled(cast("ImageData", data)) if hasattr(data, "images") else data


def step_loader(
    data: ImageData | Samples,
    *,
    seed: int,
    batch_size: int,
    steps: int,
    start: int = 0,
    shard: BatchShard = WHOLE,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """The parts of the batches of the steps ``start`` to ``steps - 1``, in order."""
    batches = StepBatches(data, seed=seed, batch_size=batch_size, shard=shard)
    items = range(start * len(shard.parts), steps * len(shard.parts))
    yield from _loader(batches, items, workers, pin_memory=pin_memory)


def _loader(batches: Dataset[Any], items: range, workers: int, *, pin_memory: bool = False) -> Iterator[Any]:
    """Forked workers share the manifest and images in memory, and need no pickling."""
    forks = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    loader = DataLoader(
        _WithErrors(batches),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_main,
        multiprocessing_context="fork" if forks else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _WithErrors(Dataset[Any]):
    """Batches, or in their place the mistake of a user that was found on the way.

    What a worker raises, a loader raises once more with the worker's whole traceback as its message.
    """

    def __init__(self, batches: Dataset[Any]) -> None:
        self._batches = batches

    def __getitem__(self, item: int) -> Any:
        try:
            return self._batches[item]
        except UserError as error:
            return error


def _leave_signals_to_main(_: int) -> None:
    """Schedulers and terminals signal every process; a step can only be finished while its workers live."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


class PlainBatches(Dataset[Any]):
    """Item ``i`` is the i-th batch of the given indices, without augmentation."""

    def __init__(self, data: ImageData | Samples, split: str, indices: np.ndarray, batch_size: int) -> None:
        self.samples, self.split, self.indices, self.batch_size = _samples(data), split, indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, item: int) -> Any:
        chosen = self.indices[item * self.batch_size : (item + 1) * self.batch_size]
        return self.samples.batch(self.split, chosen, None)


def plain_loader(
    data: ImageData | Samples, split: str, indices: np.ndarray, batch_size: int, workers: int = 0
) -> Iterator[Any]:
    """All batches of the given indices, in order."""
    batches = PlainBatches(data, split, indices, batch_size)
    return _loader(batches, range(len(batches)), workers)
