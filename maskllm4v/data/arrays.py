"""Images kept in memory, augmented a batch at a time: small data sets cost next to nothing this way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.config import AugmentationSettings
from maskllm4v.data.manifest import Manifest
from maskllm4v.utils.errors import ConfigError

Whole = slice(None)


class ArrayImages:
    """A source whose splits are tensors ``[count, C, H, W]``, uint8 or normalised float32.

    Args:
        manifest: of the source.
        load: gives a split's images; called once a split, when it is first needed.
        augmentation: ``shift``, ``shift_probability`` and ``hflip``.
        mean, std: a value a channel, subtracted from and divided by after scaling uint8 to [0, 1]; of float32 they
            only say how it was normalised.
        background: what a shift moves in; None: the image's own reflection.
    """

    def __init__(
        self,
        manifest: Manifest,
        load: Callable[[str], Tensor],
        augmentation: AugmentationSettings,
        *,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        background: float | None = None,
    ) -> None:
        if augmentation.auto_augment or augmentation.random_erasing:
            raise ConfigError("task.auto_augment and task.random_erasing are not for images that are kept in memory")
        self.manifest, self.augmentation, self.background = manifest, augmentation, background
        self._load, self._loaded = load, dict[str, Tensor]()
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def labels(self, split: str) -> Tensor:
        return torch.from_numpy(self.manifest.labels(split))

    def resized(self, size: int) -> Self:
        """The same images at another size: bilinear, with anti-aliasing."""
        other = type(self)(self.manifest, lambda split: _resize(self._split(split), size), self.augmentation)
        other.mean, other.std, other.background = self.mean, self.std, self.background
        return other

    def images(
        self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = Whole
    ) -> Tensor:
        images = self._split(split)[torch.from_numpy(indices[part])]
        if augment is not None:
            images = self._augmented(images, augment, len(indices), part)
        if images.dtype == torch.uint8:
            images = images.float().div_(255).sub_(self.mean).div_(self.std)
        return images

    def _split(self, split: str) -> Tensor:
        if split not in self._loaded:
            self._loaded[split] = self._load(split)
        return self._loaded[split]

    def _augmented(self, images: Tensor, augment: np.random.Generator, count: int, part: slice) -> Tensor:
        """Draws are made for all images of the batch, so that they do not depend on how it is divided."""
        height, width = images.shape[-2:]
        columns = torch.arange(width).expand(len(images), -1)  # [B, W]
        rows = torch.arange(height).expand(len(images), -1)  # [B, H]
        if shift := self.augmentation.shift:
            offsets = augment.integers(0, 2 * shift + 1, size=(2, count))
            stays = augment.random(count) >= self.augmentation.shift_probability
            offsets[:, stays] = shift  # the middle of the padded image
            dy, dx = torch.from_numpy(offsets[:, part])
            rows, columns = dy[:, None] + rows, dx[:, None] + columns
            images = _padded(images, shift, self.background)
        if self.augmentation.hflip:
            flips = torch.from_numpy(augment.random(count)[part] < self.augmentation.hflip)
            columns = torch.where(flips[:, None], columns.flip(1), columns)
        if not shift and not self.augmentation.hflip:
            return images
        numbers = torch.arange(len(images))[:, None, None]
        return images[numbers, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _padded(images: Tensor, by: int, background: float | None) -> Tensor:
    if background is not None:
        return F.pad(images, (by,) * 4, value=background)
    return F.pad(images.float(), (by,) * 4, mode="reflect").to(images.dtype)  # uint8 has no reflection


def _resize(images: Tensor, size: int) -> Tensor:
    resized = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True) for chunk in images.split(1000)
    ]
    whole = torch.cat(resized)
    return whole.round_().clamp_(0, 255).byte() if images.dtype == torch.uint8 else whole
