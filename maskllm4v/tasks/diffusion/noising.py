"""The forward process: noised inputs, and everything that is drawn for them.

x_t = √ᾱ_t·x₀ + √(1 − ᾱ_t)·ε (Ho et al. 2020, Eq. 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskllm4v.tasks.diffusion.settings import DiffusionSettings
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.io import read_json


class NoisyBatch(NamedTuple):
    """What the model sees, and the noise that it is to find.

    Attributes:
        inputs: x_t, ``[B, C, H, W]``.
        timesteps: int64 ``[B]``, from 0 on.
        labels: int64 ``[B]``; the last class of all stands for none.
        noise: ε, ``[B, C, H, W]``.
    """

    inputs: Tensor
    timesteps: Tensor
    labels: Tensor
    noise: Tensor


class Draws(NamedTuple):
    """What is drawn for a batch, on the CPU: all samples' at once, so that it does not depend on how it is divided."""

    timesteps: np.ndarray  # int64 [B]
    dropped: np.ndarray  # bool [B]: whose label is hidden
    noise: np.ndarray  # float32 [B, C, H, W]
    encoder: np.ndarray  # float32 [B, C, H, W]: what an autoencoder draws

    def part(self, part: slice) -> Draws:
        return Draws(*(values[part] for values in self))


def draw(rng: np.random.Generator, count: int, shape: tuple[int, ...], steps: int, dropout: float) -> Draws:
    """Uniform timesteps, hidden labels and noise for ``count`` samples of a shape ``[C, H, W]``."""
    timesteps, dropped = rng.integers(0, steps, count), rng.random(count) < dropout
    return Draws(timesteps, dropped, normal(rng, count, *shape), normal(rng, count, *shape))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal float32: drawn in float64 and rounded, so that the last bits of a C library's log do not show."""
    return rng.standard_normal(shape).astype(np.float32)


def stratified(rng: np.random.Generator, count: int, steps: int) -> np.ndarray:
    """One timestep of each of ``count`` equal parts of 0 to ``steps`` − 1, in random order; int64 ``[count]``."""
    spread = (np.arange(count) + rng.random(count)) * (steps / count)
    found: np.ndarray = rng.permutation(np.minimum(spread.astype(np.int64), steps - 1))
    return found


def schedule_config(settings: DiffusionSettings) -> dict[str, Any]:
    """The noise schedule in diffusers' words, from its folder or from the settings.

    Raises:
        ConfigError: the folder has none, or it is one for models that predict anything but the noise.
    """
    own = {
        "num_train_timesteps": settings.train_timesteps,
        "beta_schedule": settings.beta_schedule,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
    }
    if settings.scheduler is None:
        return own
    found = read_json(Path(settings.scheduler) / "scheduler_config.json")
    if found.get("prediction_type", "epsilon") != "epsilon":
        raise ConfigError(f"{settings.scheduler}: prediction_type is {found['prediction_type']!r}; allowed: 'epsilon'")
    if found.get("trained_betas") is not None:
        raise ConfigError(f"{settings.scheduler} lists its betas one by one, which is not supported")
    if found.get("rescale_betas_zero_snr"):
        raise ConfigError(f"{settings.scheduler} rescales its betas to zero signal, which is not supported")
    return {key: found.get(key, value) for key, value in own.items()}


def alphas_cumprod(config: dict[str, Any]) -> Tensor:
    """ᾱ_t, float32 ``[timesteps]``."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    found: Tensor = DDPMScheduler(**config).alphas_cumprod
    return found


def noised(clean: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """x_t of x₀ and ε ``[B, C, H, W]``, timesteps ``[B]`` and ᾱ ``[timesteps]``."""
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
