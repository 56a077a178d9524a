"""Class-conditional diffusion transformers, in pixels or in an autoencoder's latent space."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.config import TaskSpec
from maskllm4v.data import ImageData, open_data
from maskllm4v.data.manifest import Manifest
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.tasks.base import ExportableModel, JudgeTraining
from maskllm4v.tasks.diffusion import noising
from maskllm4v.tasks.diffusion.dit import build_dit, condition, read_weights
from maskllm4v.tasks.diffusion.images import GeneratedDataset, PixelSpace, VAELatents
from maskllm4v.tasks.diffusion.judge import classifier
from maskllm4v.tasks.diffusion.measuring import Measuring
from maskllm4v.tasks.diffusion.noising import Draws, NoisyBatch
from maskllm4v.tasks.diffusion.sampling import Sampler
from maskllm4v.tasks.diffusion.settings import DiffusionSettings, DiTSettings, EvaluationSettings, SamplingSettings
from maskllm4v.tasks.shared.loading import DataTask
from maskllm4v.utils.distributed import rows_of_all
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.io import file_digest, value_digest
from maskllm4v.utils.processes import rank, world_size
from maskllm4v.utils.rng import generator
from maskllm4v.utils.sharding import WHOLE, BatchShard

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODULATION = ("transformer_blocks.*.norm1.linear",)  # get one row per sample


class Denoiser(nn.Module):
    """A DiT from tensors to a tensor."""

    def __init__(self, dit: nn.Module) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        outputs: Tensor = self.dit(sample, timestep=timestep, class_labels=class_labels, return_dict=False)[0]
        return outputs


class Diffusion(DataTask):
    """Squared error of the predicted noise, or of all outputs to the dense model's; samples for people to look at.

    Labels are hidden in the data, one draw a sample: diffusers would draw one a block, and in training mode only.
    Models stay in evaluation mode while they are trained.
    """

    def __init__(self, spec: TaskSpec, data_folder: Path | None = None) -> None:
        super().__init__(spec, data_folder)
        assert isinstance(spec.task, DiffusionSettings)
        assert isinstance(spec.model, DiTSettings)
        assert isinstance(spec.evaluation, EvaluationSettings)
        self.settings, self.model, self.evaluation = spec.task, spec.model, spec.evaluation
        self._bank: GeneratedDataset | None = None

    @cached_property
    def space(self) -> PixelSpace:
        """What the model works on."""
        if self.settings.vae is None:
            return PixelSpace()
        latents = VAELatents(Path(self.settings.vae), self.device)
        if (found := latents.channels) != self.shape[0]:
            raise ConfigError(f"model.args.in_channels is {self.shape[0]}, but {self.settings.vae} makes {found}")
        return latents

    @cached_property
    def data(self) -> ImageData:
        """Real images, opened when first needed."""
        size, channels = self.shape[1] * self.space.factor, 3 if self.settings.vae else self.shape[0]
        half = (0.5,) * channels
        transform = {
            "input_size": (channels, size, size),
            "mean": half,
            "std": half,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        }
        settings, folder = self.opened()
        data = open_data(folder, settings, self.settings.augmentation, transform)
        if (found := len(data.manifest.classes)) != self.classes:
            raise ConfigError(f"model.args.num_embeds_ada_norm is {self.classes}, but the data has {found} classes")
        return data

    @property
    def source(self) -> ImageData:
        """What is learned and calibrated from."""
        return self._bank or self.data

    @property
    def manifest(self) -> Manifest:
        return self.data.manifest

    @cached_property
    def data_digest(self) -> str:
        """Of the manifest; in a latent space of the autoencoder, too, without which the images say nothing."""
        digest, vae = self.manifest.digest, self.settings.vae
        if vae is None:
            return digest
        return value_digest([digest, *(file_digest(path) for path in sorted(Path(vae).iterdir()) if path.is_file())])

    @property
    def judge(self) -> JudgeTraining | None:
        judge = self.settings.judge
        if judge is None:
            return None
        return JudgeTraining(classifier(judge, self.spec, self.folder), judge.model.name, judge.training)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the model's inputs, ``(C, H, W)``."""
        return self.model.shape

    @property
    def classes(self) -> int:
        """How many there are; the label of that number stands for none."""
        return self.model.classes

    @cached_property
    def schedule(self) -> dict[str, Any]:
        """The noise schedule, in diffusers' words."""
        return noising.schedule_config(self.settings)

    @cached_property
    def alphas(self) -> Tensor:
        """ᾱ_t, ``[timesteps]``, on the device."""
        return noising.alphas_cumprod(self.schedule).to(self.device)

    def sampler(self, settings: SamplingSettings) -> Sampler:
        return Sampler(settings, self.schedule, self.shape, self.classes, self.model.learned_sigma)

    def build_model(self, seed: int, *, pretrained: bool = False) -> nn.Module:
        if pretrained:
            raise ConfigError("dense.init is 'pretrained', which a DiT is not by name; say checkpoint, and a folder")
        return build_dit(self.model, seed).to(self.device)

    def read_weights(self, path: Path) -> Mapping[str, Tensor]:
        return read_weights(path)

    def train_mode(self, model: nn.Module) -> None:
        model.eval()

    def resized(self, size: int) -> Diffusion:
        raise ConfigError("dense.progressive is not for diffusion, whose models have one size")

    def generated(self, dense: nn.Module, seed: int) -> Diffusion:
        other = copy.copy(self)
        other._bank = GeneratedDataset(*self.samples(dense, seed), self.data)
        return other

    def samples(self, dense: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
        """Samples ``[count, C, H, W]`` of a model to learn from, made by all processes, and labels, on the CPU."""
        settings, size = self.settings.bank, self.settings.eval_batch_size
        labels, sampler = torch.arange(settings.samples) % self.classes, self.sampler(settings)
        own = range(rank(), settings.samples, world_size())
        made = [torch.zeros(0, *self.shape, device=self.device)]
        for numbers in (own[first : first + size] for first in range(0, len(own), size)):
            chosen = labels[list(numbers)].to(self.device)
            with self.autocast():
                made.append(sampler(dense, chosen, numbers, seed=seed, purpose="bank", text="making samples"))
        return rows_of_all(torch.cat(made), settings.samples).cpu(), labels

    def autocast(self) -> torch.autocast:
        """The precision of evaluation and sampling."""
        amp = self.settings.eval_amp
        return torch.autocast(self.device.type, AMP.get(amp), enabled=amp != "no")

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[NoisyBatch]:
        loader = self.step_batches(seed=seed, batch_size=batch_size, steps=steps, start=start, shard=shard)
        size = batch_size // shard.count
        keys = ((step, part) for step in range(start, steps) for part in shard.parts)
        for (images, labels), (step, part) in zip(loader, keys, strict=True):
            draws = self._draw(generator(seed, "diffusion", step), batch_size)
            yield self.noised(images, labels, draws.part(slice(part * size, (part + 1) * size)))

    def calibration(self, batch_size: int, seed: int) -> Sequence[Calibration]:
        """Two parts: conditions alone for the adaLN layers, more of them; noised samples for all others."""
        conditions = Calibration(self._conditions(batch_size, seed), condition, MODULATION, independent=True)
        return [conditions, Calibration(self._calibration_batches(batch_size, seed), self.forward)]

    def forward(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        """ε, and the variance's share if the model gives it out: ``[B, C or 2·C, H, W]``."""
        outputs: Tensor = model(batch.inputs, timestep=batch.timesteps, class_labels=batch.labels, return_dict=False)[0]
        return outputs

    def loss(self, outputs: Tensor, batch: NoisyBatch) -> Tensor:
        """Mean squared error of ε (Ho et al. 2020, Eq. 14)."""
        return F.mse_loss(outputs[:, : batch.noise.shape[1]].float(), batch.noise)

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float, batch: NoisyBatch) -> Tensor:
        """Mean squared error of all outputs, the variance's included; nothing here has a temperature."""
        return F.mse_loss(outputs.float(), teacher.float())

    def evaluate(self, model: nn.Module, dense: nn.Module | None = None, split: str | None = None) -> dict[str, float]:
        return Measuring(self).metrics(model, dense, split or self.settings.eval_split)

    def score(self, model: nn.Module, split: str) -> float:
        """How small the squared error of ε is."""
        return -Measuring(self).squared_errors(model, None, split)["eps_mse"]

    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        return Measuring(self).pictures(model)

    def summary(self, model: nn.Module, metrics: dict[str, float], extra_parameters: int) -> dict[str, Any]:
        return {}

    def exportable(self, model: nn.Module, batch_size: int) -> ExportableModel:
        """From ``sample`` ``[B, C, H, W]``, ``timestep`` and ``class_labels`` ``[B]``; see :meth:`forward`."""
        rng = generator(0, "deployable")
        drawn = {
            "sample": noising.normal(rng, batch_size, *self.shape),
            "timestep": rng.integers(0, len(self.alphas), batch_size),
            "class_labels": rng.integers(0, self.classes + 1, batch_size),
        }
        return ExportableModel(
            Denoiser(model), {name: torch.from_numpy(v) for name, v in drawn.items()}, ("noise_pred",)
        )

    def clean(self, images: Tensor, drawn: np.ndarray) -> Tensor:
        """x₀ of real images; ``drawn``: normal noise ``[B, C, H, W]`` for an autoencoder."""
        images, data = images.to(self.device, non_blocking=True), self.data
        expected = (3 if self.settings.vae else self.shape[0], *(side * self.space.factor for side in self.shape[1:]))
        if images.shape[1:] != expected:
            raise ConfigError(f"the images are {_size(images.shape[1:])}, but the model is for {_size(expected)}")
        pixels = (images * data.std.to(images) + data.mean.to(images)) * 2 - 1
        return self.space.encode(pixels, noising.on(self.device, drawn))

    def noised(self, images: Tensor, labels: Tensor, draws: Draws) -> NoisyBatch:
        """What the model sees of a source's images ``[B, C, H, W]`` with labels ``[B]``."""
        timesteps, noise = noising.on(self.device, draws.timesteps), noising.on(self.device, draws.noise)
        hidden = torch.where(torch.from_numpy(draws.dropped), self.classes, labels).to(self.device)
        real = self._bank is None
        clean = self.clean(images, draws.encoder) if real else images.to(self.device, non_blocking=True)
        return self.batch(clean, timesteps, hidden, noise)

    def batch(self, clean: Tensor, timesteps: Tensor, labels: Tensor, noise: Tensor) -> NoisyBatch:
        """x₀ ``[B, C, H, W]`` under the noise of timesteps ``[B]``."""
        return NoisyBatch(noising.noised(clean, noise, timesteps, self.alphas), timesteps, labels, noise)

    def _draw(self, rng: np.random.Generator, count: int) -> Draws:
        return noising.draw(rng, count, self.shape, len(self.alphas), self.settings.label_dropout)

    def _calibration_batches(self, batch_size: int, seed: int) -> Iterator[NoisyBatch]:
        """Timesteps stratified over the whole set; what is drawn for a sample depends on its place in it alone."""
        split, chosen = self.calibration_samples(seed)
        if self._bank is not None:  # whose labels go through the classes in turn
            drawn = generator(seed, "calibration", "samples").permutation(len(self._bank.samples))
            split, chosen = "train", drawn[: len(chosen)]
        strata = noising.stratified(generator(seed, "calibration timesteps"), len(chosen), len(self.alphas))
        own = np.arange(len(chosen))[rank() :: world_size()]
        place = 0
        for images, labels in self.plain_batches(split, chosen, batch_size):
            places = own[place : place + len(labels)]
            place += len(labels)
            draws = [self._draw(generator(seed, "calibration", int(i)), 1) for i in places]
            whole = Draws(*(np.concatenate(values) for values in zip(*draws, strict=True)))
            yield self.noised(images, labels, whole._replace(timesteps=strata[places]))

    def _conditions(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Timesteps ``[B]`` and labels ``[B]`` for the adaLN layers, this process's share."""
        count, rng = self.settings.conditioning_samples, generator(seed, "conditions")
        timesteps = noising.stratified(rng, count, len(self.alphas))
        labels = np.where(
            rng.random(count) < self.settings.label_dropout, self.classes, rng.permutation(count) % self.classes
        )
        own = slice(rank(), None, world_size())
        pairs = (noising.on(self.device, np.ascontiguousarray(values[own])) for values in (timesteps, labels))
        yield from zip(*(values.split(batch_size) for values in pairs), strict=True)


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


TASK = Diffusion
