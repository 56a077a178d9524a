"""What is trained in the benchmarks: a model, its batch and its settings, on random images."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from maskllm4v.config import Experiment, LearningSettings, TaskSpec, load_experiment
from maskllm4v.data import prepare
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.tasks.base import Task, open_task
from maskllm4v.tasks.classification.models import image_settings, num_classes
from maskllm4v.tasks.classification.settings import ClassificationSettings, TimmSettings
from maskllm4v.tasks.classification.task import Batch, Classification
from maskllm4v.tasks.diffusion.noising import NoisyBatch
from maskllm4v.tasks.diffusion.task import Diffusion
from maskllm4v.utils.sharding import WHOLE, BatchShard

EXPERIMENTS = Path("experiments")


class RandomImages(Classification):
    """A task with random images and labels: forward pass and losses are its own, data costs nothing.

    Args:
        spec: its settings; only those of the model and the task are used.
        device: where to compute.
        calibration: images of the calibration set.
    """

    def __init__(self, spec: TaskSpec, device: torch.device, calibration: int = 128) -> None:
        super().__init__(spec)
        self.device = device
        self.calibration_images = calibration

    def batch(self, size: int) -> Batch:
        """Images ``[size, C, H, W]`` of normal noise, and labels ``[size]``."""
        images = torch.randn(size, *image_settings(self.model)["input_size"], device=self.device)
        return images, torch.randint(num_classes(self.model), (size,), device=self.device)

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[Batch]:
        parts = [self.batch(batch_size // shard.count) for _ in shard.parts]
        for _ in range(start, steps):
            yield from parts

    def steps_per_epoch(self, batch_size: int) -> int:
        return 1_000_000  # no epoch ends while a benchmark runs

    def calibration(self, batch_size: int, seed: int) -> list[Calibration]:
        sizes = (min(batch_size, self.calibration_images - n) for n in range(0, self.calibration_images, batch_size))
        return [Calibration((self.batch(size) for size in sizes), self.forward)]


class RandomNoise(Diffusion):
    """The same of a diffusion task: noised inputs, timesteps and labels at random."""

    def __init__(self, spec: TaskSpec, device: torch.device, calibration: int = 128) -> None:
        super().__init__(spec)
        self.device = device
        self.calibration_images = calibration

    def random_batch(self, size: int) -> NoisyBatch:
        inputs, noise = torch.randn(2, size, *self.shape, device=self.device)
        timesteps = torch.randint(len(self.alphas), (size,), device=self.device)
        return NoisyBatch(inputs, timesteps, torch.randint(self.classes, (size,), device=self.device), noise)

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[NoisyBatch]:
        parts = [self.random_batch(batch_size // shard.count) for _ in shard.parts]
        for _ in range(start, steps):
            yield from parts

    def steps_per_epoch(self, batch_size: int) -> int:
        return 1_000_000

    def _calibration_batches(self, batch_size: int, seed: int) -> Iterator[NoisyBatch]:
        for n in range(0, self.calibration_images, batch_size):
            yield self.random_batch(min(batch_size, self.calibration_images - n))


def random_task(experiment: Experiment, device: torch.device, calibration: int | None = None) -> Task:
    """An experiment's task on random data; ``calibration``: images of a set, by default the experiment's number.

    Scenes are made here anyway: of them it is the first batch, again and again, and their own calibration set.
    """
    if experiment.data.source == "scenes":
        return _first_batch(experiment, device)
    kind = RandomNoise if experiment.task.name == "diffusion" else RandomImages
    return kind(experiment.task_spec(), device, calibration or experiment.data.calibration)


def _first_batch(experiment: Experiment, device: torch.device) -> Task:
    folder = Path(tempfile.mkdtemp(prefix="scenes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare(experiment.data, folder)
    task: Any = open_task(experiment.task_spec(), folder)
    task.device = device
    draw = task.train_batches

    def train_batches(
        *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[Any]:
        parts = list(draw(seed=seed, batch_size=batch_size, steps=1, shard=shard))
        for _ in range(start, steps):
            yield from parts

    task.train_batches = train_batches
    return cast(Task, task)


@dataclass(frozen=True)
class Workload:
    """One model to train.

    Attributes:
        name: in the tables.
        spec: of its task.
        pattern: of its masks.
        learning: how its masks are learned; batch size, precision and clipping hold for all variants.
        device: its type, the one that this workload is for; None: any.
    """

    name: str
    spec: TaskSpec
    pattern: str
    learning: LearningSettings
    device: str | None = None

    def build(self, device: torch.device) -> nn.Module:
        """The dense model with random weights; each time the same ones."""
        return RandomImages(self.spec, device).build_model(0)


def workloads(*, quick: bool = False) -> dict[str, Workload]:
    """All of them by name. ``quick``: the same names, but tiny models and batches."""
    found = [
        _vit("vit_tiny", "vit_tiny_patch16_224", 8, "no", "cpu", quick),
        _vit("vit_base", "vit_base_patch16_224", 8, "bf16", "cpu", quick),
        _vit("vit_base_128", "vit_base_patch16_224", 128, "bf16", "cuda", quick),
        *(_of_table(table, quick) for table in ("digits", "cifar10")),
    ]
    return {workload.name: workload for workload in found}


def _vit(name: str, model: str, batch_size: int, amp: Literal["no", "bf16"], device: str, quick: bool) -> Workload:
    """A vision transformer on 224×224 images and 1,000 classes, its masks learned as in the one-epoch ImageNet rows."""
    tiny = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    spec = TaskSpec(ClassificationSettings(label_smoothing=0.1), TimmSettings(name=model, args=tiny if quick else {}))
    size = 2 if quick else batch_size
    learning = LearningSettings(steps=1000, batch_size=size, amp=amp, tau=(1.0, 1.0), scaling=(100.0, 100.0))
    return Workload(name, spec, "2:4", learning, device)


def _of_table(table: str, quick: bool) -> Workload:
    """The model of one of this repository's tables, its masks learned as in its first learned row."""
    experiment = load_experiment(EXPERIMENTS / f"{table}.yaml")
    learning = next(iter(experiment.learned.values()))
    changes: dict[str, Any] = {"batch_size": 2} if quick else {}
    return Workload(table, experiment.task_spec(), experiment.pattern, learning.model_copy(update=changes), "cpu")
