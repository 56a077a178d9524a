"""Image sources: a verified manifest first, then images by index.

``prepare`` writes ``manifest.json`` (what the source is, classes, counts, digests, the calibration
subset) and one CSV a split (a line an image). No image is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from maskllm4v.config import DataSettings
from maskllm4v.data.manifest import Manifest, read_manifest
from maskllm4v.errors import DataError

__all__ = ["ImageData", "Manifest", "open_data", "prepare", "read_manifest"]


class ImageData(Protocol):
    """Images and labels of a source, by split (``"train"``, ``"test"``) and index."""

    manifest: Manifest

    def labels(self, split: str) -> Tensor:
        """All labels of a split, int64 ``[count]``."""

    def images(self, split: str, indices: np.ndarray, augment: np.random.Generator | None) -> Tensor:
        """Normalised images, float32 ``[len(indices), C, H, W]``, augmented if a generator is given."""


def prepare(settings: DataSettings, folder: Path) -> Manifest:
    """Turn a data source into a manifest in ``folder``.

    Raises:
        DataError: the source is missing, empty, or has unreadable files.
    """
    if settings.source == "digits":
        from maskllm4v.data.digits import prepare_digits

        return prepare_digits(settings, folder)
    from maskllm4v.data.folder import prepare_folder

    return prepare_folder(settings, folder)


def open_data(folder: Path, **options: Any) -> ImageData:
    """The images behind a prepared manifest; ``options`` go to the source.

    Raises:
        DataError: the manifest is missing or damaged, or the source is not what it says.
    """
    manifest = read_manifest(folder)
    if manifest.source == "digits":
        from maskllm4v.data.digits import Digits

        return Digits(manifest, **options)
    if manifest.source == "folder":
        from maskllm4v.data.folder import ImageFolder

        return ImageFolder(manifest, **options)
    raise DataError(f"{folder}: unknown source {manifest.source!r}; allowed: digits, folder")
