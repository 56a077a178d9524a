"""scikit-learn's digits: 1,797 real images of 8×8 pixels, on every machine without a download."""

from __future__ import annotations

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskllm4v.config import AugmentationSettings, DataSettings
from maskllm4v.data.arrays import ArrayImages
from maskllm4v.data.manifest import Entry, Manifest, write_manifest
from maskllm4v.utils.errors import DataError


def prepare_digits(settings: DataSettings, folder: Path) -> Manifest:
    """A stratified split, its calibration subset, and the training split's mean and standard deviation."""
    from sklearn.model_selection import train_test_split

    images, labels = _load()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=settings.test_fraction, stratify=labels, random_state=settings.split_seed
    )

    def entries(indices: np.ndarray) -> list[Entry]:
        return [Entry(str(i), int(labels[i]), images[i].nbytes, _digest(images[i])) for i in indices]

    return write_manifest(
        folder,
        settings=settings,
        classes=[str(digit) for digit in range(10)],
        splits={"train": entries(train), "test": entries(test)},
        # In float64, rounded: the same text on every machine.
        extra={"mean": round(float(images[train].mean()), 6), "std": round(float(images[train].std()), 6)},
    )


def open_digits(manifest: Manifest, augmentation: AugmentationSettings) -> ArrayImages:
    """The images, normalised float32 ``[count, 1, 8, 8]``.

    Raises:
        DataError: scikit-learn's images are not the ones that the manifest describes.
    """
    mean, std = manifest.extra["mean"], manifest.extra["std"]
    images, _ = _load()
    for entries in manifest.splits.values():
        for entry in entries:
            if _digest(images[int(entry.path)]) != entry.sha256:
                raise DataError(f"digits: image {entry.path} is not the one the manifest describes; run prepare again")

    def load(split: str) -> Tensor:
        chosen = images[[int(entry.path) for entry in manifest.splits[split]]]
        return torch.from_numpy((chosen - mean) / std).float().unsqueeze(1)

    return ArrayImages(manifest, load, augmentation, mean=(mean,), std=(std,), background=float((0 - mean) / std))


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], float64 ``[1797, 8, 8]``, and labels."""
    images, labels = digit_images()
    return images / 16.0, labels


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Images of integers from 0 to 16, int64 ``[1797, 8, 8]``, and labels ``[1797]``.

    Read from the file that scikit-learn ships; ``sklearn.datasets.load_digits`` gives the same, but its
    import takes two seconds, in every stage.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("data.source is 'digits', which needs scikit-learn: pip install scikit-learn")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as stream:
            table = np.array([[float(cell) for cell in line.split(",")] for line in stream]).astype(np.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256((image * 16).astype(np.uint8).tobytes()).hexdigest()[:16]
