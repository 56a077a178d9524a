"""Batches of prepared data, the same way for every task that has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.config import DataSettings, TaskSpec
from maskllm4v.data import ImageData
from maskllm4v.data.batches import Samples, StepBatches, plain_loader, step_loader
from maskllm4v.data.manifest import Manifest
from maskllm4v.utils.devices import pick_device
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.processes import rank, world_size
from maskllm4v.utils.sharding import WHOLE, BatchShard


class DataTask:
    """A task on images that a stage has prepared.

    Args:
        spec: the task's settings.
        data_folder: of the manifest; it need not be there before data are asked for.
    """

    def __init__(self, spec: TaskSpec, data_folder: Path | None = None) -> None:
        self.spec = spec
        self.device = pick_device(spec.runtime.device)
        self.folder = data_folder

    @property
    def source(self) -> ImageData | Samples:
        """What batches are made of."""
        raise NotImplementedError

    @property
    def manifest(self) -> Manifest:
        """Of the data."""
        raise NotImplementedError

    @property
    def data_digest(self) -> str:
        return self.manifest.digest

    def opened(self) -> tuple[DataSettings, Path]:
        """Settings and folder of the data.

        Raises:
            ConfigError: the task was opened without.
        """
        if self.spec.data is None or self.folder is None:
            raise ConfigError(f"task {self.spec.task.name!r} was opened without data")
        return self.spec.data, self.folder

    def steps_per_epoch(self, batch_size: int) -> int:
        return StepBatches(self.source, seed=0, batch_size=batch_size).steps_per_epoch

    def step_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[Any]:
        """The parts of the steps' batches, as the loader's workers give them, on the CPU."""
        return step_loader(
            self.source,
            seed=seed,
            batch_size=batch_size,
            steps=steps,
            start=start,
            shard=shard,
            workers=self.spec.runtime.loader_workers,
            pin_memory=self.device.type == "cuda",
        )

    def plain_batches(self, split: str, indices: np.ndarray, batch_size: int) -> Iterator[Any]:
        """This process's share of some samples, one in so many as there are processes, on the CPU."""
        own = indices[rank() :: world_size()]
        return plain_loader(self.source, split, own, batch_size, self.spec.runtime.loader_workers)

    def calibration_samples(self, seed: int) -> tuple[str, np.ndarray]:
        """The split and the indices of a seed's calibration set.

        Raises:
            ConfigError: there are fewer than processes.
        """
        indices = self.manifest.calibration[self.spec.calibration_set(seed)]
        if len(indices) < world_size():
            raise ConfigError(f"data.calibration is {len(indices)}, fewer than the {world_size()} processes")
        return self.manifest.calibration_split, indices
