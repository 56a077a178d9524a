"""A picture, its mask and its boxes brought to a model's size together, by torchvision's transforms v2.

Random numbers are torch's global ones: whoever calls :func:`augmented` seeds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from maskllm4v.config.sections import JointAugmentationSettings
from maskllm4v.data.annotated import IGNORED
from maskllm4v.utils.errors import ConfigError

MODES = ("squash", "letterbox")
SMALLEST = 1.0  # pixels a side that a box has to keep in a crop, or its object is not there any more
Move = Callable[..., Tensor]  # one of torchvision's functionals, for tensors of any kind


@dataclass(frozen=True)
class Sample:
    """A picture and what is known of it, all of one size.

    Attributes:
        image: uint8 or float32 ``[C, h, w]``.
        mask: uint8 ``[1, h, w]``, classes or :data:`IGNORED`; None of a source without masks.
        boxes: float32 ``[n, 4]``: left, top, right, bottom in pixels.
        classes: int64 ``[n]``.
    """

    image: tv_tensors.Image
    mask: tv_tensors.Mask | None
    boxes: tv_tensors.BoundingBoxes
    classes: Tensor

    @classmethod
    def of(cls, image: Tensor, mask: Tensor | None, boxes: Tensor, classes: Tensor) -> Sample:
        """From plain tensors; the mask is ``[h, w]``."""
        size = (int(image.shape[-2]), int(image.shape[-1]))
        return cls(
            tv_tensors.Image(image),
            None if mask is None else tv_tensors.Mask(mask[None]),
            tv_tensors.BoundingBoxes(boxes.float().view(-1, 4), format="XYXY", canvas_size=size),
            classes,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])

    def moved(self, move: Move, *args: Any) -> Sample:
        """All of it through one of torchvision's functionals."""
        mask = None if self.mask is None else move(self.mask, *args)
        return Sample(move(self.image, *args), mask, move(self.boxes, *args), self.classes)


@dataclass(frozen=True)
class ModelInput:
    """What a model takes.

    Attributes:
        size: height and width in pixels.
        channels: 1 or 3.
        mean, std: a value a channel, for images in [0, 1].
        mode: ``squash``: to the size whatever the shape; ``letterbox``: shape kept, and padded on the right or below.
        interpolation: of pictures; masks take the nearest pixel.
    """

    size: tuple[int, int]
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    mode: str = "squash"
    interpolation: str = "bilinear"

    @classmethod
    def of(cls, transform: Mapping[str, Any]) -> ModelInput:
        """From ``input_size``, ``mean``, ``std`` and, where they are there, ``mode`` and ``interpolation``.

        Raises:
            ConfigError: there is no such mode or interpolation.
        """
        channels, height, width = transform["input_size"]
        rest = {key: transform[key] for key in ("mode", "interpolation") if transform.get(key) is not None}
        made = cls((height, width), channels, tuple(transform["mean"]), tuple(transform["std"]), **rest)
        if made.mode not in MODES:
            raise ConfigError(f"model.input.mode is {made.mode!r}; allowed: {', '.join(MODES)}")
        known = [mode.value for mode in InterpolationMode]
        if made.interpolation not in known:
            raise ConfigError(f"model.input.interpolation is {made.interpolation!r}; allowed: {', '.join(known)}")
        return made

    def fitted(self, size: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
        """A size scaled so that it fits into the model's, times a factor."""
        ratio = factor * min(wanted / side for wanted, side in zip(self.size, size, strict=True))
        height, width = (max(1, round(side * ratio)) for side in size)
        return height, width

    def resized(self, sample: Sample, size: tuple[int, int]) -> Sample:
        """At another size. Masks take the pixel with the nearest centre; torchvision's own choice is half one off."""
        functional = v2.functional
        image = functional.resize(sample.image, list(size), InterpolationMode(self.interpolation), antialias=True)
        boxes = functional.resize(sample.boxes, list(size))
        if (mask := sample.mask) is not None:
            nearest = functional.resize_image(mask.as_subclass(Tensor), list(size), InterpolationMode.NEAREST_EXACT)
            mask = tv_tensors.Mask(nearest)
        return Sample(image, mask, boxes, sample.classes)

    def plain(self, sample: Sample) -> Sample:
        """Without anything random, and without padding."""
        return self.resized(sample, self.size if self.mode == "squash" else self.fitted(sample.size))

    def finished(self, sample: Sample) -> Sample:
        """Normalised, and padded to the model's size."""
        image = v2.functional.to_dtype(sample.image, torch.float32, scale=True)
        image = v2.functional.normalize(image, list(self.mean), list(self.std))
        right, below = self.size[1] - sample.size[1], self.size[0] - sample.size[0]
        pad = v2.Pad([0, 0, right, below], fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED, "others": 0})
        return replace(sample, image=image).moved(pad)


class Augmentation:
    """What is done to training images, at random.

    Args:
        settings: what.
        wanted: the size that comes out, padding left off.
    """

    def __init__(self, settings: JointAugmentationSettings, wanted: ModelInput) -> None:
        self.settings, self.wanted = settings, wanted

    def __call__(self, sample: Sample) -> Sample:
        """Objects that a crop leaves less than :data:`SMALLEST` pixels of are gone."""
        settings, functional = self.settings, v2.functional
        if settings.hflip and float(torch.rand(())) < settings.hflip:
            sample = sample.moved(functional.horizontal_flip)
        sample = self._cropped(sample)
        if settings.color_jitter:
            sample = replace(sample, image=self._colours(sample.image))
        boxes, kept = functional.sanitize_bounding_boxes(
            functional.clamp_bounding_boxes(sample.boxes), min_size=SMALLEST, min_area=SMALLEST
        )
        return replace(sample, boxes=boxes, classes=sample.classes[kept])

    def _cropped(self, sample: Sample) -> Sample:
        if self.settings.crop_scale is not None:
            place = self._place.make_params([sample.image])
            box = [place[key] for key in ("top", "left", "height", "width")]
            return self.wanted.resized(sample.moved(v2.functional.crop, *box), self.wanted.size)
        if self.settings.scale_jitter is not None:
            low, high = self.settings.scale_jitter
            factor = low + (high - low) * float(torch.rand(()))
            sample = self.wanted.resized(sample, self.wanted.fitted(sample.size, factor))
            height, width = map(min, sample.size, self.wanted.size)
            top, left = (
                int(torch.randint(0, side - kept + 1, ()))
                for side, kept in zip(sample.size, (height, width), strict=True)
            )
            return sample.moved(v2.functional.crop, top, left, height, width)
        return self.wanted.plain(sample)

    @cached_property
    def _place(self) -> v2.RandomResizedCrop:
        assert self.settings.crop_scale is not None
        return v2.RandomResizedCrop(self.wanted.size, self.settings.crop_scale, self.settings.crop_ratio)

    @cached_property
    def _colours(self) -> v2.ColorJitter:
        strength = self.settings.color_jitter
        return v2.ColorJitter(strength, strength, strength)
