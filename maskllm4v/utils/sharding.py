"""How the batch of a step is divided over processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShard:
    """The parts of every global batch that one process computes, one after the other.

    Attributes:
        count: equal parts that a batch is cut into: processes times micro-batches.
        parts: this process's, ascending.
    """

    count: int = 1
    parts: range = range(1)

    @classmethod
    def of(cls, rank: int, processes: int, micro_batches: int) -> BatchShard:
        return cls(processes * micro_batches, range(rank * micro_batches, (rank + 1) * micro_batches))


WHOLE = BatchShard()
