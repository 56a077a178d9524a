"""Training batches as a pure function of the global step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskllm4v.data import ImageData
from maskllm4v.errors import DataError
from maskllm4v.randomness import generator


class StepBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item ``step`` is the whole batch of that step: images ``[B, C, H, W]`` and labels ``[B]``.

    Every epoch is a new permutation of the training split, its incomplete last batch dropped. Order and
    augmentation depend on (seed, epoch) and (seed, step) only, so neither the number of loader workers
    nor the step a run was resumed at changes a single bit.
    """

    def __init__(self, data: ImageData, *, seed: int, batch_size: int) -> None:
        self.data, self.seed, self.batch_size = data, seed, batch_size
        self.labels = data.labels("train")
        self.steps_per_epoch = len(self.labels) // batch_size
        if not self.steps_per_epoch:
            raise DataError(f"batch_size is {batch_size}, but the training split has {len(self.labels)} images")

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.labels))
        indices = order[position * self.batch_size : (position + 1) * self.batch_size]
        images = self.data.images("train", indices, generator(self.seed, "augment", step))
        return images, self.labels[indices]


def step_loader(
    data: ImageData, *, seed: int, batch_size: int, steps: int, start: int = 0, workers: int = 0
) -> Iterator[Any]:
    """Batches of the steps ``start`` to ``steps - 1``."""
    batches = StepBatches(data, seed=seed, batch_size=batch_size)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(start, steps), num_workers=workers, persistent_workers=False
    )
    yield from loader


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)
