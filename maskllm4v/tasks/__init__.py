"""What differs between classification, diffusion and other tasks, behind one small protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from maskllm4v.config import Experiment
from maskllm4v.share import Share


class Task(Protocol):
    """Everything that pruning, training and evaluation need to know about a task.

    A batch is whatever :meth:`train_batches` yields; nobody but the task looks inside it.
    """

    @property
    def data_digest(self) -> str:
        """Digest of the data's manifest."""

    def build_model(self, seed: int) -> nn.Module:
        """The dense architecture, its weights drawn from ``seed`` where nothing else is loaded."""

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, share: Share = ...
    ) -> Iterator[Any]:
        """The batches of the steps ``start`` to ``steps - 1``, on the task's device.

        Of every batch of ``batch_size`` samples only the parts of ``share`` are yielded, one after the other.
        """

    def steps_per_epoch(self, batch_size: int) -> int:
        """Training steps that see every training sample about once."""

    def resized(self, size: int) -> Task:
        """The same task on images of another size, for progressive resizing."""

    def calibration_batches(self, batch_size: int, seed: int) -> Iterable[Any]:
        """This process's share of a seed's calibration set, without augmentation."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model on a batch; all that calibration needs."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Training loss, a scalar."""

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far the outputs are from the dense model's, a scalar."""

    def evaluate(self, model: nn.Module, dense: nn.Module | None = None, split: str | None = None) -> dict[str, float]:
        """Metrics by name, over all samples of a split (by default the reported one) on all processes.

        ``dense``, if given, is the model that ``model`` was made from, to say how far they agree.
        """

    def summary(self, model: nn.Module, metrics: dict[str, float], extra_parameters: int) -> dict[str, Any]:
        """The result in the original's form, for people who compare."""


def open_task(experiment: Experiment, data_folder: Path) -> Task:
    """The task of an experiment on a prepared data source."""
    from maskllm4v.tasks.classification import Classification

    return Classification(experiment, data_folder)
