"""Pictures with annotations: a class for each pixel, or boxes with classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from maskllm4v.data.manifest import Entry, Manifest
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.io import file_digest, replacing

IGNORED = 255  # the class of pixels that belong to none and are neither learned nor counted
NONE = -1  # the class of rows that only fill a batch of boxes up


class AnnotatedBatch(NamedTuple):
    """A batch of pictures and what is known of them, at the size that a model takes, padded on the right and below.

    Attributes:
        images: normalised, float32 ``[B, C, H, W]``; padding is 0, the mean colour.
        masks: int64 ``[B, H, W]``, a class for each pixel or :data:`IGNORED`, as padding is; ``[B, 0, 0]`` of a source
            without masks.
        boxes: float32 ``[B, K, 4]``: left, top, right, bottom in pixels of ``images``; K is the batch's largest count.
            Crowds are not among them.
        classes: int64 ``[B, K]``; :data:`NONE` from the image's last box on.
        valid: int64 ``[B, 2]``: height and width without padding.
        sizes: int64 ``[B, 2]``: height and width of the pictures as they are stored; scores are taken at this size.
        truth: int64 ``[B, H', W']``: for scores, the masks as they are stored, padded with :data:`IGNORED` to the
            largest of the batch. In training, and where pictures have the model's size, the same as ``masks``.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    classes: Tensor
    valid: Tensor
    sizes: Tensor
    truth: Tensor

    def to(self, device: torch.device) -> AnnotatedBatch:
        return AnnotatedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def size(self) -> tuple[int, int]:
        """H and W of ``images``."""
        height, width = self.images.shape[2:]
        return height, width

    def at_full_size(self, boxes: Tensor) -> Tensor:
        """Boxes ``[B, ..., 4]`` in pixels of ``images``, in pixels of the pictures as they are stored."""
        factors = (self.sizes / self.valid).flip(1).repeat(1, 2).to(boxes)  # of x, y, x, y
        return boxes * factors.view(len(boxes), *[1] * (boxes.ndim - 2), 4)


class Objects(NamedTuple):
    """What an image shows, for average precision; all in pixels of the picture as it is stored.

    Attributes:
        boxes: float64 ``[n, 4]``: left, top, right, bottom.
        classes: int64 ``[n]``.
        crowds: bool ``[n]``: a box of many objects; what is found there is neither right nor wrong.
        areas: float64 ``[n]``, in pixels; average precision by size goes by them.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray

    @classmethod
    def of(cls, boxes: np.ndarray, classes: np.ndarray) -> Objects:
        """Without crowds, as large as their boxes."""
        corners = boxes.astype(np.float64)
        return cls(corners, classes, np.zeros(len(classes), bool), np.prod(corners[:, 2:] - corners[:, :2], 1))


class AnnotatedData(Protocol):
    """Annotated images of a source, by split (``"train"``, ``"test"``, ``"holdout"``) and index.

    Attributes:
        manifest: of the source; its classes are those of boxes.
        mask_classes: the names of pixels' classes; empty if there are no masks.
    """

    manifest: Manifest
    mask_classes: tuple[str, ...]

    def count(self, split: str) -> int:
        """How many images a split has."""

    def batch(
        self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = ...
    ) -> AnnotatedBatch:
        """The images ``indices[part]``, augmented if a generator is given."""

    def annotations(self, split: str) -> Iterator[Objects]:
        """The objects of each image, in order; no image is read."""

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images ``[B, C, H, W]`` as they were, uint8."""


@dataclass(frozen=True)
class AnnotatedArrays:
    """Images of one size with their annotations, in memory.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        masks: uint8 ``[N, H, W]``.
        boxes: int64 ``[N, K, 4]``, left, top, right, bottom in pixels.
        classes: int64 ``[N, K]``, :data:`NONE` where an image has fewer boxes.
    """

    images: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(
        cls,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        boxes: Sequence[np.ndarray],
        classes: Sequence[np.ndarray],
    ) -> AnnotatedArrays:
        """From one array per image."""
        most = max((len(found) for found in classes), default=0)
        padded = np.zeros((len(images), most, 4), np.int64)
        known = np.full((len(images), most), NONE, np.int64)
        for i, (corners, found) in enumerate(zip(boxes, classes, strict=True)):
            padded[i, : len(found)], known[i, : len(found)] = corners, found
        return cls(np.stack(images), np.stack(masks), padded, known)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: np.ndarray) -> AnnotatedArrays:
        return AnnotatedArrays(self.images[indices], self.masks[indices], self.boxes[indices], self.classes[indices])


def annotated_entries(arrays: AnnotatedArrays) -> list[Entry]:
    """A line of the manifest for each image; its digest is of image and annotations, its label how many objects."""
    import hashlib

    def digest(i: int) -> str:
        parts = (arrays.images[i], arrays.masks[i], arrays.boxes[i], arrays.classes[i])
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

    counts = (arrays.classes != NONE).sum(1)
    return [Entry(str(i), int(counts[i]), arrays.images[i].nbytes, digest(i)) for i in range(len(arrays))]


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write them as safetensors; returns the file's SHA-256."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as target:
        save_file(dict(arrays), target)
    return file_digest(path)


def load_arrays(path: Path, digest: str) -> dict[str, np.ndarray]:
    """Read what :func:`save_arrays` wrote.

    Raises:
        DataError: the file is missing, or not the one with this digest.
    """
    from safetensors.numpy import load_file

    if not path.exists() or file_digest(path) != digest:
        raise DataError(f"{path} is missing or is not the one its manifest describes; run the prepare stage again")
    return load_file(path)


class ArraysInMemory:
    """An :class:`AnnotatedData` of images that are kept in memory and not augmented.

    Args:
        manifest: of the source.
        load: gives a split's arrays; called once per split, when it is first needed.
        mean, std: subtracted from and divided by, after uint8 was scaled to [0, 1].
    """

    def __init__(self, manifest: Manifest, load: Loader, *, mean: float, std: float) -> None:
        self.manifest, self.mean, self.std = manifest, mean, std
        self.mask_classes = tuple(manifest.extra["mask_classes"])
        self._load, self._loaded = load, dict[str, AnnotatedArrays]()

    def arrays(self, split: str) -> AnnotatedArrays:
        if split not in self._loaded:
            self._loaded[split] = self._load(split)
        return self._loaded[split]

    def count(self, split: str) -> int:
        return len(self.manifest.splits[split])

    def batch(
        self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = slice(None)
    ) -> AnnotatedBatch:
        found = self.arrays(split).subset(indices[part])
        images = torch.from_numpy(found.images).float().div_(255).sub_(self.mean).div_(self.std)
        masks = torch.from_numpy(found.masks).long()
        boxes, classes = torch.from_numpy(found.boxes).float(), torch.from_numpy(found.classes)
        sizes = torch.tensor(images.shape[2:]).repeat(len(images), 1)
        return AnnotatedBatch(images, masks, boxes, classes, valid=sizes, sizes=sizes, truth=masks)

    def annotations(self, split: str) -> Iterator[Objects]:
        arrays = self.arrays(split)
        for boxes, classes in zip(arrays.boxes, arrays.classes, strict=True):
            yield Objects.of(boxes[classes != NONE], classes[classes != NONE])

    def pixels(self, images: Tensor) -> Tensor:
        return (images * self.std + self.mean).mul(255).round().clamp(0, 255).byte()


class Loader(Protocol):
    """Gives the arrays of a split."""

    def __call__(self, split: str) -> AnnotatedArrays: ...
