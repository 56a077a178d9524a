"""Image sources: a verified manifest first, then images by index.

``prepare`` writes ``manifest.json`` (what the source is, classes, counts, digests, the calibration
subset) and one CSV a split (a line an image). No image is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from maskllm4v.config import AugmentationSettings, DataSettings
from maskllm4v.config.sections import EMBEDDED, JointAugmentationSettings
from maskllm4v.data.annotated import AnnotatedData
from maskllm4v.data.manifest import Manifest, read_manifest
from maskllm4v.utils.errors import ConfigError, DataError

KINDS = {"coco": ("boxes",), "masks": ("masks",), "scenes": ("boxes", "masks")}  # what annotated sources have

__all__ = ["AnnotatedData", "ImageData", "Manifest", "open_annotated", "open_data", "prepare", "read_manifest"]


class ImageData(Protocol):
    """Images and labels of a source, by split (``"train"``, ``"test"``, ``"holdout"``) and index.

    Attributes:
        manifest: of the source.
        mean, std: what images are normalised with, a value a channel ``[C, 1, 1]``, in a range of [0, 1].
    """

    manifest: Manifest
    mean: Tensor
    std: Tensor

    def labels(self, split: str) -> Tensor:
        """All labels of a split, int64 ``[count]``."""

    def images(self, split: str, indices: np.ndarray, augment: np.random.Generator | None, part: slice = ...) -> Tensor:
        """Normalised images of ``indices[part]``, float32 ``[B, C, H, W]``, augmented if a generator is given.

        An image's augmentation depends on its place in ``indices``, not on which part is asked for.
        """

    def resized(self, size: int) -> ImageData:
        """The same images at another size, in pixels."""


def prepare(settings: DataSettings, folder: Path, *, one_split: bool = False) -> Manifest:
    """Turn a data source into a manifest in ``folder``.

    Args:
        settings: which source, and its splits.
        folder: what to write.
        one_split: only one split is needed, which ``settings`` names as both.

    Raises:
        ConfigError: training and reported images are the same, though both are needed.
        DataError: the source is missing, empty, or has unreadable files.
    """
    own_folders = settings.source not in (*EMBEDDED, "coco")  # coco: one folder may hold the pictures of both splits
    if own_folders and not one_split and settings.train == settings.test:
        raise ConfigError(
            f"data.train and data.test are both {settings.train!r}: the reported images would be trained on"
        )
    if settings.source == "digits":
        from maskllm4v.data.digits import prepare_digits

        return prepare_digits(settings, folder)
    if settings.source == "scenes":
        from maskllm4v.data.scenes import prepare_scenes

        return prepare_scenes(settings, folder)
    if settings.source == "timm":
        from maskllm4v.data.timm_datasets import prepare_timm

        return prepare_timm(settings, folder)
    if settings.source == "masks":
        from maskllm4v.data.index_masks import prepare_masks

        return prepare_masks(settings, folder)
    if settings.source == "coco":
        from maskllm4v.data.coco import prepare_coco

        return prepare_coco(settings, folder)
    from maskllm4v.data.folder import prepare_folder

    return prepare_folder(settings, folder)


def open_data(
    folder: Path, data: DataSettings, augmentation: AugmentationSettings, transform: Mapping[str, Any]
) -> ImageData:
    """The images behind a prepared manifest.

    Args:
        folder: of the manifest.
        data: how images are kept.
        augmentation: how they are augmented.
        transform: size, mean, std, crop and interpolation, as :mod:`maskllm4v.tasks.classification.models` has them.

    Raises:
        DataError: the manifest is missing, damaged or of another source, or the source is not what it says.
    """
    manifest = _manifest(folder, data)
    if data.source in KINDS:
        raise ConfigError(f"data.source is {data.source!r}, whose images have masks or boxes, but no label")
    if data.source == "digits":
        from maskllm4v.data.digits import open_digits

        return open_digits(manifest, augmentation)
    from maskllm4v.data.decoded import DecodedImages, in_memory

    if data.source == "timm":
        from maskllm4v.data.timm_datasets import reader
    else:
        from maskllm4v.data.folder import reader
    read = reader(manifest, data)
    if data.in_memory:
        return in_memory(manifest, read, augmentation, transform, data.in_memory)
    return DecodedImages(manifest, read, augmentation, transform)


def open_annotated(
    folder: Path,
    data: DataSettings,
    augmentation: JointAugmentationSettings,
    transform: Mapping[str, Any],
    *,
    needs: Literal["masks", "boxes"],
) -> AnnotatedData:
    """The images with masks or boxes behind a prepared manifest.

    Args:
        folder: of the manifest.
        data: which source it is of.
        augmentation: of training images.
        transform: what the model takes: ``input_size`` (channels, height, width), ``mean`` and ``std``, and if there
            are any ``mode`` (squash or letterbox) and ``interpolation``. See :class:`maskllm4v.data.joint.ModelInput`.
        needs: what the task cannot do without.

    Raises:
        ConfigError: the source has no masks or boxes, cannot be augmented, or is not of the model's size.
        DataError: the manifest is missing, damaged or of another source, or the source is not what it says.
    """
    manifest = _manifest(folder, data)
    if data.source not in (able := [source for source, kinds in KINDS.items() if needs in kinds]):
        raise ConfigError(f"data.source is {data.source!r}, which has no {needs}; allowed: {', '.join(able)}")
    if data.source == "scenes":
        from maskllm4v.data.scenes import open_scenes

        return open_scenes(manifest, folder, data.scenes, augmentation, transform)
    if data.source == "masks":
        from maskllm4v.data.index_masks import open_masks

        return open_masks(manifest, folder, augmentation, transform)
    from maskllm4v.data.coco import open_coco

    return open_coco(manifest, folder, augmentation, transform)


def _manifest(folder: Path, data: DataSettings) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.source != data.source:
        raise DataError(f"{folder} is a manifest of source {manifest.source!r}, not {data.source!r}; run prepare again")
    return manifest
