"""Pictures decoded when asked for, with their masks or boxes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors

from maskllm4v.config.sections import JointAugmentationSettings
from maskllm4v.data.annotated import IGNORED, NONE, AnnotatedBatch, Objects
from maskllm4v.data.decoded import Read, decode, seeded_globals
from maskllm4v.data.joint import Augmentation, ModelInput, Sample
from maskllm4v.data.manifest import Manifest
from maskllm4v.data.pictures import Size
from maskllm4v.utils.errors import DataError


class Annotations(Protocol):
    """What is known of pictures, by split and index.

    Attributes:
        mask_classes: see :class:`~maskllm4v.data.annotated.AnnotatedData`.
    """

    mask_classes: tuple[str, ...]

    def mask(self, split: str, index: int) -> np.ndarray | None:
        """Classes or :data:`IGNORED`, uint8 ``[h, w]``; None if there are only boxes."""

    def objects(self, split: str, index: int) -> Objects:
        """Of one picture; none if there are only masks."""

    def check_size(self, split: str, index: int, size: Size, name: str) -> None:
        """Raise :class:`DataError` where a picture, as it was decoded, has another height and width than is known."""


class AnnotatedFiles:
    """An :class:`~maskllm4v.data.annotated.AnnotatedData` of files.

    Args:
        manifest: of the source.
        read: opens a picture.
        known: masks or boxes.
        augmentation: of training images.
        transform: what the model takes (:meth:`maskllm4v.data.joint.ModelInput.of`).
    """

    def __init__(
        self,
        manifest: Manifest,
        read: Read,
        known: Annotations,
        augmentation: JointAugmentationSettings,
        transform: Mapping[str, Any],
    ) -> None:
        self.manifest, self.mask_classes = manifest, known.mask_classes
        self._read, self._known, self._input = read, known, ModelInput.of(transform)
        self._augment = Augmentation(augmentation, self._input)
        self._mode = "L" if self._input.channels == 1 else "RGB"
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (self._input.mean, self._input.std))

    def count(self, split: str) -> int:
        return len(self.manifest.splits[split])

    def batch(
        self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = slice(None)
    ) -> AnnotatedBatch:
        # A seed for each image of the batch, so that none depends on how it is divided.
        seeds = None if augment is None else augment.integers(2**31, size=len(indices))[part]
        samples: list[Sample] = []
        valid: list[Size] = []
        sizes: list[Size] = []
        stored_masks: list[tv_tensors.Mask | None] = []
        for place, index in enumerate(indices[part]):  # a large picture is let go before the next one is decoded
            stored = self._sample(split, int(index))
            resized = self._input.plain(stored) if seeds is None else self._augmented(stored, int(seeds[place]))
            samples.append(self._input.finished(resized))
            valid.append(resized.size)
            sizes.append(stored.size)
            stored_masks.append(stored.mask)
        masks = _padded_masks([sample.mask for sample in samples])
        boxes, classes = _padded_objects(samples)
        return AnnotatedBatch(
            images=torch.stack([sample.image.as_subclass(Tensor) for sample in samples]),
            masks=masks,
            boxes=boxes,
            classes=classes,
            valid=torch.tensor(valid),
            sizes=torch.tensor(sizes),
            truth=masks if augment is not None else _padded_masks(stored_masks),
        )

    def annotations(self, split: str) -> Iterator[Objects]:
        return (self._known.objects(split, i) for i in range(self.count(split)))

    def pixels(self, images: Tensor) -> Tensor:
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images * std + mean).mul(255).round().clamp(0, 255).byte()

    def _augmented(self, sample: Sample, seed: int) -> Sample:
        with seeded_globals(seed):
            return self._augment(sample)

    def _sample(self, split: str, index: int) -> Sample:
        """As it is stored; crowds are left out, for they are not learned."""
        entry = self.manifest.splits[split][index]
        pixels = torch.from_numpy(np.array(decode(self._read, entry, self._mode)))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        self._known.check_size(split, index, (int(pixels.shape[1]), int(pixels.shape[2])), entry.path)
        mask, objects = self._known.mask(split, index), self._known.objects(split, index)
        if mask is not None and mask.shape != tuple(pixels.shape[1:]):
            raise DataError(f"{entry.path} is of another size than its mask; run the prepare stage again")
        boxes, classes = (torch.from_numpy(part[~objects.crowds]) for part in (objects.boxes, objects.classes))
        return Sample.of(pixels, None if mask is None else torch.from_numpy(mask), boxes, classes)


def _padded_masks(found: Sequence[tv_tensors.Mask | None]) -> Tensor:
    """At the size of the largest, int64 ``[B, H, W]``; ``[B, 0, 0]`` if there are none."""
    masks = [mask.as_subclass(Tensor)[0] for mask in found if mask is not None]
    if not masks:
        return torch.empty(len(found), 0, 0, dtype=torch.int64)
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))
    padded = [F.pad(mask, (0, width - mask.shape[1], 0, height - mask.shape[0]), value=IGNORED) for mask in masks]
    return torch.stack(padded).long()


def _padded_objects(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Boxes ``[B, K, 4]`` and classes ``[B, K]``."""
    most = max((len(sample.classes) for sample in samples), default=0)
    boxes = torch.zeros(len(samples), most, 4)
    classes = torch.full((len(samples), most), NONE)
    for i, sample in enumerate(samples):
        boxes[i, : len(sample.classes)] = sample.boxes.as_subclass(Tensor)
        classes[i, : len(sample.classes)] = sample.classes
    return boxes, classes
