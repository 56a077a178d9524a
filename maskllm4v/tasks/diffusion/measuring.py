"""What a diffusion model is measured by: squared errors at every noise level, and its samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from maskllm4v.data.batches import plain_loader
from maskllm4v.tasks.diffusion.images import picture
from maskllm4v.tasks.diffusion.judge import Judge, classifier, distances
from maskllm4v.tasks.diffusion.noising import NoisyBatch, normal, on
from maskllm4v.utils.distributed import rows_of_all, sum_
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.processes import rank, world_size
from maskllm4v.utils.progress import bar
from maskllm4v.utils.rng import generator

if TYPE_CHECKING:
    from maskllm4v.tasks.diffusion.task import Diffusion

SEED = 0  # of evaluation's noise: every row of every seed is measured on the same


class Measuring:
    """Measures models of one task; a sample's noise depends on its number alone, not on batches or processes."""

    def __init__(self, task: Diffusion) -> None:
        self.task, self.settings = task, task.evaluation

    @torch.no_grad()
    def metrics(self, model: nn.Module, dense: nn.Module | None, split: str) -> dict[str, float]:
        """Squared errors, and what the judge says of samples if there are to be any.

        ``accuracy`` and ``judge_accuracy`` are in percent; the second, of real images, goes with the dense model.
        """
        found = self.squared_errors(model, dense, split)
        return {**found, **self.judged(model, split, real=dense is None)} if self.settings.samples else found

    @cached_property
    def timesteps(self) -> list[int]:
        """The middles of equal parts of all timesteps."""
        count, steps = self.settings.timesteps, len(self.task.alphas)
        return [int((i + 0.5) * steps / count) for i in range(count)]

    @torch.no_grad()
    def squared_errors(self, model: nn.Module, dense: nn.Module | None, split: str) -> dict[str, float]:
        """``eps_mse`` of the noise and ``dense_mse`` to the dense model's outputs, each also at every timestep.

        The means are over images, values and timesteps, all weighing the same.
        """
        model.eval()
        sums = torch.zeros(2, len(self.timesteps), dtype=torch.float64, device=self.task.device)
        counts = torch.zeros_like(sums)
        for numbers, images, labels in self._images(split):
            encoder = np.stack([normal(generator(SEED, "encoder", i), *self.task.shape) for i in numbers])
            clean, labels = self.task.clean(images, encoder), labels.to(self.task.device)
            for k, timestep in enumerate(self.timesteps):
                noise = [normal(generator(SEED, "evaluation", i, timestep), *self.task.shape) for i in numbers]
                batch = self._noised(clean, labels, timestep, on(self.task.device, np.stack(noise)))
                with self.task.autocast():
                    outputs = self.task.forward(model, batch).double()
                    reference = None if dense is None else self.task.forward(dense, batch).double()
                errors = [outputs[:, : batch.noise.shape[1]] - batch.noise]
                errors += [] if reference is None else [outputs - reference]
                for row, error in enumerate(errors):
                    sums[row, k] += error.square().sum()
                    counts[row, k] += error.numel()
        sum_(sums, counts)
        found: dict[str, float] = {}
        for row, name in enumerate(("eps_mse", "dense_mse")):
            if row == 0 or dense is not None:
                levels = (sums[row] / counts[row]).tolist()
                found[name] = sum(levels) / len(levels)
                found |= {f"{name}/t{timestep:04d}": e for timestep, e in zip(self.timesteps, levels, strict=True)}
        return found

    @torch.no_grad()
    def judged(self, model: nn.Module, split: str, *, real: bool) -> dict[str, float]:
        """``accuracy``, ``fd``, ``kd``; with ``real`` also what share of real images the judge gets right."""
        task, count = self.task, self.settings.samples
        settings, weights = task.settings.judge, task.spec.judge
        assert settings is not None  # the settings are validated
        if weights is None:
            raise ConfigError(f"evaluation.samples is {count}, but the task was opened without weights of task.judge")
        judge = Judge(classifier(settings, task.spec, task.folder), weights)
        sampler, size = task.sampler(self.settings), task.settings.eval_batch_size
        own = np.arange(count)[rank() :: world_size()]
        made, hits = [judge.no_features()], torch.zeros((), dtype=torch.float64, device=task.device)
        for first in range(0, len(own), size):
            numbers = own[first : first + size]
            labels = on(task.device, numbers % task.classes)
            with self.task.autocast():
                samples = sampler(model, labels, numbers.tolist(), seed=SEED)
            features, logits = judge.features(judge.as_data(task.space.decode(samples.float())))
            hits += (logits.argmax(1) == labels).sum()
            made.append(features)
        sum_(hits)
        found = {"accuracy": 100 * float(hits) / count}
        found |= distances(judge.real(split, size), rows_of_all(torch.cat(made), count))
        if real:
            found["judge_accuracy"] = judge.task.evaluate(judge.model, split=split)["top1"]
        return found

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        """``samples``: one of each class of the grid, from the same noise for every model."""
        labels = torch.tensor(self.settings.pictured(self.task.classes), device=self.task.device)
        with self.task.autocast():
            samples = self.task.sampler(self.settings)(model, labels, range(len(labels)), seed=SEED, purpose="picture")
        return {"samples": picture(self.task.space.decode(samples.float()), self.settings.columns)}

    def _images(self, split: str) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers, images and labels of this process's share of the images to evaluate."""
        task = self.task
        total = len(task.data.manifest.splits[split])
        chosen = np.arange(total)
        if self.settings.images and self.settings.images < total:
            chosen = np.sort(generator(SEED, "evaluated").permutation(total)[: self.settings.images])
        own, size = chosen[rank() :: world_size()], task.settings.eval_batch_size
        loader = plain_loader(task.data, split, own, size, task.spec.runtime.loader_workers)
        starts = range(0, len(own), size)
        for first, (images, labels) in zip(starts, bar(loader, "evaluating", total=len(starts)), strict=True):
            yield own[first : first + size].tolist(), images, labels

    def _noised(self, clean: Tensor, labels: Tensor, timestep: int, noise: Tensor) -> NoisyBatch:
        timesteps = torch.full_like(labels, timestep)
        return self.task.batch(clean, timesteps, labels, noise)
