"""From pictures to what the model works on, and back: pixels in [-1, 1], or an autoencoder's latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskllm4v.data import ImageData
from maskllm4v.utils.errors import CheckpointError

GREY = 128  # between pictures
CHUNK = 8  # images that an autoencoder works on at a time


class PixelSpace:
    """Pixels as they are.

    Attributes:
        factor: how much smaller the model's inputs are than the images, a side.
    """

    factor = 1

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images in [-1, 1] to x₀, both ``[B, C, H, W]``; ``noise``: what a random encoder draws."""
        return images

    def decode(self, samples: Tensor) -> Tensor:
        """x₀ to images in [-1, 1]."""
        return samples.clamp(-1, 1)


class VAELatents(PixelSpace):
    """The latent space of a diffusers ``AutoencoderKL``, scaled to unit variance.

    Args:
        folder: of the autoencoder, with ``config.json`` and its weights.
        device: where it computes.

    Raises:
        CheckpointError: there is none.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        options = {"local_files_only": True, "low_cpu_mem_usage": False, "output_loading_info": True}
        try:
            vae, loaded = AutoencoderKL.from_pretrained(str(folder), **options)
        except (OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise CheckpointError(f"task.vae: {folder} holds no diffusers autoencoder: {said}") from error
        if missing := loaded["missing_keys"]:
            raise CheckpointError(f"task.vae: {folder} lacks weights, e.g. {missing[0]}")
        if vae.config.shift_factor is not None:
            raise CheckpointError(f"task.vae: {folder} shifts its latents, which no DiT was trained with")
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = int(vae.config.latent_channels)
        self._scale = vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        found = []
        for part, drawn in zip(images.split(CHUNK), noise.split(CHUNK), strict=True):
            latents = self.vae.encode(part).latent_dist
            found.append((latents.mean + latents.std * drawn) * self._scale)
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        parts = [self.vae.decode(part / self._scale, return_dict=False)[0] for part in samples.split(CHUNK)]
        return torch.cat(parts).float().clamp(-1, 1)


class GeneratedDataset:
    """Samples in the place of a training split: x₀ ``[count, C, H, W]`` and labels ``[count]``, on the CPU.

    It is an :class:`~maskllm4v.data.ImageData` of one split; its images need no encoding.
    """

    def __init__(self, samples: Tensor, labels: Tensor, data: ImageData) -> None:
        self.samples, self._labels, self.manifest = samples, labels, data.manifest
        self.mean, self.std = data.mean, data.std

    def labels(self, split: str) -> Tensor:
        return self._labels

    def images(
        self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = slice(None)
    ) -> Tensor:
        return self.samples[torch.from_numpy(indices[part])]

    def resized(self, size: int) -> GeneratedDataset:
        raise NotImplementedError("samples have one size")


def picture(images: Tensor, columns: int) -> np.ndarray:
    """A grid of images in [-1, 1] ``[B, C, H, W]``, row by row: uint8 ``[rows·(H+g)−g, columns·(W+g)−g(, 3)]``.

    The gap g is a 32nd of an image, one pixel at least, and grey, as are places without an image.
    """
    count, channels, height, width = images.shape
    gap = max(1, height // 32)
    rows = -(-count // columns)
    high, wide = height + gap, width + gap
    levels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    grid = torch.full((rows * columns, channels, high, wide), GREY, dtype=torch.uint8)
    grid[:count, :, :height, :width] = levels
    grid = grid.view(rows, columns, channels, high, wide).permute(0, 3, 1, 4, 2)
    whole: np.ndarray = grid.reshape(rows * high, columns * wide, channels)[:-gap, :-gap].numpy()
    return np.ascontiguousarray(whole[:, :, 0] if channels == 1 else whole)
