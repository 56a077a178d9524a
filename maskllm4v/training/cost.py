"""What a run costs on its machine, as opposed to what it gives."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """What a run cost on its machine: never part of a record.

    Attributes:
        samples_per_second: without the first step of this process.
        peak_memory: bytes on the GPU, or of the whole process where there is none.
    """

    samples_per_second: float
    peak_memory: int


class Clock:
    """Counts what a run costs, from the end of its first step on."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self.first: float | None = None
        self.ticks = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def tick(self) -> None:
        """Note the end of a step."""
        if self.first is None:
            self.first = self._now()
        else:
            self.ticks += 1

    def cost(self) -> Cost:
        seconds = self._now() - self.first if self.first is not None else 0.0
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Cost(self.ticks * self.batch_size / seconds if self.ticks else 0.0, memory)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
