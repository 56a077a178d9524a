"""scikit-learn's digits: 1,797 real images of 8×8 pixels, on every machine without a download."""

from __future__ import annotations

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.config import DataSettings
from maskllm4v.data.manifest import Entry, Manifest, choose_calibration, write_manifest
from maskllm4v.errors import DataError


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
        name=settings.name,
        source="digits",
        classes=[str(digit) for digit in range(10)],
        splits={"train": entries(train), "test": entries(test)},
        calibration=choose_calibration(settings.calibration, len(train), settings.calibration_seed),
        # In float64, rounded: the same text on every machine.
        extra={"mean": round(float(images[train].mean()), 6), "std": round(float(images[train].std()), 6)},
    )


class Digits:
    """The images, kept in memory as float32 ``[count, 1, 8, 8]``.

    Args:
        manifest: from :func:`prepare_digits`.
        shift: augmentation: shift by up to so many pixels along each axis.
        shift_probability: share of the images that are shifted.
    """

    def __init__(self, manifest: Manifest, *, shift: int = 0, shift_probability: float = 1.0) -> None:
        self.manifest, self.shift, self.shift_probability = manifest, shift, shift_probability
        images, _ = _load()
        self._images: dict[str, Tensor] = {}
        for split, entries in manifest.splits.items():
            chosen = images[[int(entry.path) for entry in entries]]
            wrong = [e.path for e, image in zip(entries, chosen, strict=True) if _digest(image) != e.sha256]
            if wrong:
                raise DataError(f"digits: image {wrong[0]} is not the one the manifest describes; run prepare again")
            normalised = (chosen - manifest.extra["mean"]) / manifest.extra["std"]
            self._images[split] = torch.from_numpy(normalised).float().unsqueeze(1)
        self._background = float((0 - manifest.extra["mean"]) / manifest.extra["std"])

    def labels(self, split: str) -> Tensor:
        return torch.from_numpy(self.manifest.labels(split))

    def images(self, split: str, indices: np.ndarray, augment: np.random.Generator | None) -> Tensor:
        images = self._images[split][torch.from_numpy(indices)]
        if augment is None or not self.shift:
            return images
        # One draw for all, then a choice: the stream does not depend on the probability.
        offsets = augment.integers(0, 2 * self.shift + 1, size=(2, len(indices)))
        stays = augment.random(len(indices)) >= self.shift_probability
        offsets[:, stays] = self.shift  # the middle of the padded image
        dy, dx = torch.from_numpy(offsets)
        height, width = images.shape[-2:]
        padded = F.pad(images, (self.shift,) * 4, value=self._background)
        rows = (dy[:, None] + torch.arange(height))[:, :, None]  # [B, H, 1]
        columns = (dx[:, None] + torch.arange(width))[:, None, :]  # [B, 1, W]
        return padded[torch.arange(len(indices))[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], float64 ``[1797, 8, 8]``, and labels.

    Read from the file that scikit-learn ships; ``sklearn.datasets.load_digits`` gives the same, but its
    import takes two seconds, in every stage.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("data.source is 'digits', which needs scikit-learn: pip install scikit-learn")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as stream:
            table = np.array([[float(cell) for cell in line.split(",")] for line in stream])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return table[:, :-1].reshape(-1, 8, 8) / 16.0, table[:, -1].astype(np.int64)


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256((image * 16).astype(np.uint8).tobytes()).hexdigest()[:16]
