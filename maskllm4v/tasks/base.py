"""What differs between classification, diffusion and other tasks, behind one small protocol.

Each task is a folder of its own, which ``dvc.yaml`` makes the stages depend on by ``task.name``: a change of one task
makes no other task's tables anew. In it, ``task.py`` has the class, as ``TASK``; a new task is a new folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from maskllm4v.config import TaskSpec, TrainingSettings
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.sharding import BatchShard

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ExportableModel:
    """A model as other runtimes see it.

    Attributes:
        module: takes the inputs in their order, and gives a tensor, or several: a tuple of them, or a dict by name.
        inputs: an example by name, on the CPU; the first dimension of each is the batch.
        outputs: the names of what the module gives, in the order of the tuple, or as other runtimes are to have them;
            the first dimension of each is the batch.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]

    def named(self, given: Any) -> dict[str, Tensor]:
        """What the module gave, by name and in the order of ``outputs``.

        Raises:
            ConfigError: it is something else than these outputs.
        """
        if isinstance(given, Tensor):
            given = (given,)
        found = dict(given) if isinstance(given, Mapping) else dict(zip(self.outputs, given, strict=False))
        if found.keys() != set(self.outputs) or len(given) != len(self.outputs):
            said = ", ".join(map(str, given)) if isinstance(given, Mapping) else f"{len(given)} tensors"
            raise ConfigError(f"{type(self.module).__name__} gives {said}; its outputs are {', '.join(self.outputs)}")
        return {name: found[name] for name in self.outputs}


@dataclass(frozen=True)
class JudgeTraining:
    """A classifier that judges what a task's models make, and how it is trained beside the dense model.

    Attributes:
        task: the classifier's own, on the same data.
        model: the name of its architecture.
        settings: optimiser and length.
    """

    task: Task
    model: str
    settings: TrainingSettings


class Objective(Protocol):
    """What training minimises: a model's outputs on a batch, and how wrong they are.

    A batch is whatever :meth:`Task.train_batches` yields, outputs are whatever :meth:`forward` gives; nobody but the
    task looks inside them. Losses are means over a batch; those of a task with a weight (:func:`weight_of`) are sums.
    """

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Training loss, a scalar."""

    def distillation_loss(self, outputs: Any, teacher: Any, temperature: float, batch: Any) -> Tensor:
        """How far the outputs are from the dense model's on the same batch, a scalar."""


class Task(Objective, Protocol):
    """Everything that pruning, training and evaluation need to know about a task.

    It may also have ``weight(batch)`` and ``learning_mode(model)``: see :func:`weight_of` and :func:`learning_mode`.
    """

    @property
    def data_digest(self) -> str:
        """Digest of the data's manifest."""

    @property
    def judge(self) -> JudgeTraining | None:
        """What has to be trained to judge what models make; None: nothing."""

    def build_model(self, seed: int, *, pretrained: bool = False) -> nn.Module:
        """The dense architecture, its weights drawn from ``seed`` where nothing else is loaded."""

    def read_weights(self, path: Path) -> Mapping[str, Tensor]:
        """A dense model's state dict from a file or folder in any format that the task knows."""

    def train_mode(self, model: nn.Module) -> None:
        """Put a model's modules into the modes that its weights are trained in."""

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = ...
    ) -> Iterator[Any]:
        """The batches of the steps ``start`` to ``steps - 1``, on the task's device.

        Of every batch of ``batch_size`` samples only the parts of ``shard`` are yielded, one after the other.
        """

    def steps_per_epoch(self, batch_size: int) -> int:
        """Training steps that see every training sample about once."""

    def resized(self, size: int) -> Task:
        """The same task on images of another size, for progressive resizing."""

    def generated(self, dense: nn.Module, seed: int) -> Task:
        """The same task on samples that the dense model makes, in the place of the training data."""

    def calibration(self, batch_size: int, seed: int) -> Sequence[Calibration]:
        """This process's share of a seed's calibration set, without augmentation."""

    def evaluate(self, model: nn.Module, dense: nn.Module | None = None, split: str | None = None) -> dict[str, float]:
        """Metrics by name, over all samples of a split (by default the reported one) on all processes.

        ``dense``, if given, is the model that ``model`` was made from, to say how far they agree.
        """

    def score(self, model: nn.Module, split: str) -> float:
        """How good a model is on a split, more being better: what checkpoints are selected by."""

    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        """What there is to look at, by name: uint8 ``[H, W, 3]`` or ``[H, W]``."""

    def summary(self, model: nn.Module, metrics: dict[str, float], extra_parameters: int) -> dict[str, Any]:
        """The result in the original's form, for people who compare; empty where it has none."""

    def exportable(self, model: nn.Module, batch_size: int) -> ExportableModel:
        """The model and an example of that many samples, always the same one; needs no data."""


def train_mode(task: Task, model: nn.Module) -> None:
    """Put a model into the mode that its weights are trained in; a small task of a user's need not say which."""
    getattr(task, "train_mode", nn.Module.train)(model)


def learning_mode(task: Task, model: nn.Module) -> None:
    """Put a model into the mode that it is in while its masks are learned; the masks themselves follow afterwards.

    That is the task's ``learning_mode(model)``, or, without one, the mode that weights are trained in. A task has one
    where training mode computes something else than the model to be pruned: dropout, further queries, auxiliary heads.
    """
    mode = getattr(task, "learning_mode", None)
    if mode is None:
        train_mode(task, model)
    else:
        mode(model)


def weight_of(task: Objective, batch: Any) -> Tensor | None:
    """What the losses of a batch are to be divided by, known before the model runs: the task's ``weight(batch)``.

    A scalar tensor: valid pixels, say, or objects. Losses are then sums, which the trainer divides by the weight of
    the whole step, over micro-batches and processes; so neither number changes what is learned. None, or no such
    method: losses are means over samples, of which each part of a step has as many. It is one or the other for all
    batches of a task.
    """
    weight: Tensor | None = getattr(task, "weight", lambda _: None)(batch)
    return weight


def open_task(spec: TaskSpec, data_folder: Path | None = None) -> Task:
    """The task that some settings describe.

    Args:
        spec: the settings; of a table's task :meth:`maskllm4v.config.Experiment.task_spec`.
        data_folder: of the prepared data; it need not be there before data are asked for.
    """
    found: Task = import_module(f"maskllm4v.tasks.{spec.task.name}.task").TASK(spec, data_folder)
    return found
