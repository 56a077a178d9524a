"""Training batches as a pure function of the global step."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskllm4v.data import ImageData
from maskllm4v.utils.errors import ConfigError, DataError, UserError
from maskllm4v.utils.rng import generator
from maskllm4v.utils.sharding import WHOLE, BatchShard

GRACE = 60  # seconds that a loader's worker goes on after SIGTERM, if nobody ends it before


class StepBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item ``step * shard.parts + i`` is the i-th part of a step's batch: images ``[B, C, H, W]``, labels ``[B]``.

    Every epoch is a new permutation of the training split, its incomplete last batch dropped. Order and
    augmentation depend on (seed, epoch) and (seed, step) only, so neither the number of loader workers,
    of processes and micro-batches, nor the step a run was resumed at changes a single image.
    """

    def __init__(self, data: ImageData, *, seed: int, batch_size: int, shard: BatchShard = WHOLE) -> None:
        self.data, self.seed, self.batch_size, self.shard = data, seed, batch_size, shard
        self.labels = data.labels("train")
        self.steps_per_epoch = len(self.labels) // batch_size
        if not self.steps_per_epoch:
            raise DataError(f"batch_size is {batch_size}, but the training split has {len(self.labels)} images")
        if batch_size % shard.count:
            raise ConfigError(
                f"batch_size is {batch_size}, which {shard.count} processes × micro-batches do not divide"
            )

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        step, i = divmod(item, len(self.shard.parts))
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.labels))
        indices = order[position * self.batch_size : (position + 1) * self.batch_size]
        size = self.batch_size // self.shard.count
        first = self.shard.parts[i] * size
        part = slice(first, first + size)
        images = self.data.images("train", indices, generator(self.seed, "augment", step), part)
        return images, self.labels[indices[part]]


def step_loader(
    data: ImageData,
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


def _loader(
    batches: Dataset[tuple[Tensor, Tensor]], items: range, workers: int, *, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
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

    def __init__(self, batches: Dataset[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor] | UserError:
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


class PlainBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item ``i`` is the i-th batch of the given indices, without augmentation."""

    def __init__(self, data: ImageData, split: str, indices: np.ndarray, batch_size: int) -> None:
        self.data, self.split, self.indices, self.batch_size = data, split, indices, batch_size
        self.labels = data.labels(split)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        chosen = self.indices[item * self.batch_size : (item + 1) * self.batch_size]
        return self.data.images(self.split, chosen, None), self.labels[chosen]


def plain_loader(
    data: ImageData, split: str, indices: np.ndarray, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """All batches of the given indices, in order."""
    batches = PlainBatches(data, split, indices, batch_size)
    return _loader(batches, range(len(batches)), workers)
