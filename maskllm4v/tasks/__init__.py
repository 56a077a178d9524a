"""What differs between classification, diffusion and other tasks, behind one small protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from maskllm4v.config import Experiment


class Task(Protocol):
    """Everything that pruning, training and evaluation need to know about a task.

    A batch is whatever :meth:`train_batches` yields; nobody but the task looks inside it.
    """

    @property
    def data_digest(self) -> str:
        """Digest of the data's manifest."""

    def build_model(self, seed: int) -> nn.Module:
        """The dense architecture, its weights drawn from ``seed`` where nothing else is loaded."""

    def train_batches(self, *, seed: int, batch_size: int, steps: int, start: int = 0) -> Iterator[Any]:
        """The batches of the steps ``start`` to ``steps - 1``, on the task's device."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Training steps that see every training sample about once."""

    def calibration_batches(self, batch_size: int) -> Iterable[Any]:
        """The calibration subset, without augmentation."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model on a batch; all that calibration needs."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Training loss, a scalar."""

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far the outputs are from the dense model's, a scalar."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the reported split, by name."""


def open_task(experiment: Experiment, data_folder: Path) -> Task:
    """The task of an experiment on a prepared data source."""
    from maskllm4v.tasks.classification import Classification

    return Classification(experiment, data_folder)
