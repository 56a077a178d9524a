"""Images decoded when asked for, through the transforms that timm resolves for the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.config import AugmentationSettings
from maskllm4v.data.arrays import ArrayImages, Whole
from maskllm4v.data.manifest import Entry, Manifest
from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.progress import bar
from maskllm4v.utils.text import one_line

ORIENTATION = 0x0112  # of EXIF
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
Read = Callable[[Entry], tuple[Any, str]]  # a file, path or PIL image, and its name for messages


class DecodedImages:
    """A source that is too large to be kept.

    Args:
        manifest: of the source.
        read: opens an entry.
        augmentation: by timm's training transform.
        transform: size, mean, std, crop and interpolation, as :mod:`maskllm4v.tasks.classification.models` has them.
    """

    def __init__(
        self, manifest: Manifest, read: Read, augmentation: AugmentationSettings, transform: Mapping[str, Any]
    ) -> None:
        if augmentation.shift:
            raise ConfigError("task.shift is for images that are kept in memory (digits, data.in_memory)")
        self.manifest, self.augmentation, self._read, self._transform = manifest, augmentation, read, dict(transform)
        self._plain, self._augmented = plain_transform(transform), training_transform(transform, augmentation)
        self.mean, self.std = (torch.tensor(transform[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self._mode = "L" if transform["input_size"][0] == 1 else "RGB"

    def labels(self, split: str) -> Tensor:
        return torch.from_numpy(self.manifest.labels(split))

    def resized(self, size: int) -> DecodedImages:
        channels = self._transform["input_size"][0]
        smaller = {**self._transform, "input_size": (channels, size, size)}
        return DecodedImages(self.manifest, self._read, self.augmentation, smaller)

    def images(
        self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = Whole
    ) -> Tensor:
        entries = [self.manifest.splits[split][int(i)] for i in indices[part]]
        if augment is None:
            return torch.stack([self._plain(decode(self._read, entry, self._mode)) for entry in entries])
        seeds = augment.integers(2**31, size=len(indices))[part]
        images = torch.empty(len(entries), *self._transform["input_size"])  # filled while each is in cache
        for image, entry, seed in zip(images, entries, seeds, strict=True):
            with seeded_globals(int(seed)):
                image.copy_(self._augmented(decode(self._read, entry, self._mode)))
        return images


def in_memory(
    manifest: Manifest, read: Read, augmentation: AugmentationSettings, transform: Mapping[str, Any], size: int
) -> ArrayImages:
    """The same images, decoded once to squares of ``size`` pixels and kept as uint8."""
    channels = transform["input_size"][0]
    to_square = plain_transform({**transform, "input_size": (channels, size, size)}, normalize=False)
    mode = "L" if channels == 1 else "RGB"

    def load(split: str) -> Tensor:
        entries = manifest.splits[split]
        return torch.stack([to_square(decode(read, entry, mode)) for entry in bar(entries, f"decoding {split}")])

    return ArrayImages(manifest, load, augmentation, mean=transform["mean"], std=transform["std"])


def plain_transform(transform: Mapping[str, Any], normalize: bool = True) -> Callable[[Any], Tensor]:
    """timm's evaluation transform."""
    from timm.data import create_transform

    options = {k: transform[k] for k in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    return create_transform(transform["input_size"], normalize=normalize, **options)


def training_transform(transform: Mapping[str, Any], augmentation: AugmentationSettings) -> Callable[[Any], Tensor]:
    """timm's training transform.

    Raises:
        ConfigError: timm does not understand the auto-augmentation string.
    """
    from timm.data import create_transform

    try:
        return create_transform(
            transform["input_size"],
            is_training=True,
            scale=augmentation.crop_scale,
            ratio=augmentation.crop_ratio,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.train_interpolation or transform["interpolation"],
            mean=transform["mean"],
            std=transform["std"],
            re_prob=augmentation.random_erasing,
            re_mode=augmentation.erasing_mode,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"task.auto_augment is {augmentation.auto_augment!r}, which timm does not understand"
        ) from error


def decode(read: Read, entry: Entry, mode: str) -> Any:
    """A PIL image in ``mode``, turned as its EXIF orientation says.

    Raises:
        DataError: it is missing, no image, too large for PIL, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    source, name = read(entry)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        with image:
            if image.mode.startswith("I"):  # converting would clip nearly all of it to white
                raise DataError(f"{name} has more than 8 bits a channel; convert it first")
            image = ImageOps.exif_transpose(image)
            if "transparency" in image.info:
                return image.convert("RGBA").convert(mode)
            return image.convert(mode)
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise DataError(f"{name} cannot be read as an image: {one_line(error)}") from error


def shown_size(image: Any) -> tuple[int, int]:
    """Width and height of a PIL image as :func:`decode` gives it."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """timm's transforms draw from the global generators: seed all three, and put them back afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # the CPU's alone: seeding all devices takes longer than a crop
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
