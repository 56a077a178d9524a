"""Judging samples by a classifier trained on the same images, so that nothing has to be fetched.

Fréchet and kernel distances are measured between its features of real images and of samples. They are not FID and
KID, which are defined by one Inception network, and can be compared within one table only.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import load_dense
from maskllm4v.config import TaskSpec
from maskllm4v.data.batches import plain_loader
from maskllm4v.tasks.classification.models import image_settings
from maskllm4v.tasks.classification.task import Classification
from maskllm4v.tasks.diffusion.settings import JudgeSettings
from maskllm4v.utils.distributed import rows_of_all
from maskllm4v.utils.processes import rank, world_size
from maskllm4v.utils.rng import torch_seed

SUBSETS = 100  # of the kernel distance (Bińkowski et al. 2018)


def classifier(settings: JudgeSettings, judged: TaskSpec, data_folder: Path | None) -> Classification:
    """The judge's own task, on the data of the task that it judges."""
    spec = TaskSpec(settings.task, settings.model, data=judged.data, seeds=judged.seeds[:1], runtime=judged.runtime)
    return Classification(spec, data_folder)


class Judge:
    """A trained classifier, and what it thinks of images.

    Args:
        task: of :func:`classifier`.
        weights: its trained weights.
    """

    def __init__(self, task: Classification, weights: Path) -> None:
        self.task = task
        self.model = task.build_model(task.spec.seeds[0])
        load_dense(weights, self.model, task.model.name)
        self.size = image_settings(self.task.model)["input_size"][-2:]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, F]`` and logits ``[B, classes]`` of images as the classifier is trained on."""
        model: Any = self.model
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        return features, model.get_classifier()(features)

    def as_data(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as the classifier's data has them: of its size, normalised."""
        if tuple(images.shape[-2:]) != tuple(self.size):
            images = F.interpolate(images, tuple(self.size), mode="bilinear", antialias=True)
        data = self.task.source
        mean, std = data.mean.to(images), data.std.to(images)
        return ((images + 1) / 2 - mean) / std

    def no_features(self) -> Tensor:
        """``[0, F]``: where there are fewer images than processes."""
        return torch.zeros(0, int(self.model.num_features), device=self.task.device)  # type: ignore[arg-type]

    def real(self, split: str, batch_size: int) -> Tensor:
        """Features of all images of a split, in their order, ``[count, F]``."""
        count = len(self.task.source.manifest.splits[split])
        batches = plain_loader(self.task.source, split, np.arange(count)[rank() :: world_size()], batch_size)
        own = [self.features(images.to(self.task.device))[0] for images, _ in batches]
        return rows_of_all(torch.cat([self.no_features(), *own]), count)


def distances(real: Tensor, made: Tensor) -> dict[str, float]:
    """``fd`` and ``kd`` between the features ``[count, F]`` of all real images and of all samples.

    The kernel distance is the mean over random subsets of half as many as there are of the fewer.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    options: dict[str, Any] = {"feature": _Plain(real.shape[1]).to(real.device), "sync_on_compute": False}
    subset = max(2, min(len(real), len(made)) // 2)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")  # that is fine
        torch.manual_seed(torch_seed(0, "judge"))  # the subsets are drawn
        frechet = FrechetInceptionDistance(**options).to(real.device)
        kernel = KernelInceptionDistance(**options, subsets=SUBSETS, subset_size=subset).to(real.device)
        for metric in (frechet, kernel):
            metric.update(real, real=True)
            metric.update(made, real=False)
        return {"fd": float(frechet.compute()), "kd": float(kernel.compute()[0])}


class _Plain(nn.Module):
    """The metrics' feature extractor: what they are given are features already."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: Tensor) -> Tensor:
        return features
