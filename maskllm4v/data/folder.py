"""Image folders: ``<root>/<split>/<class>/<image>``, as ImageNet is laid out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.config import DataSettings
from maskllm4v.data.manifest import Entry, Manifest, choose_calibration, write_manifest
from maskllm4v.errors import DataError
from maskllm4v.files import file_digest
from maskllm4v.progress import bar

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def prepare_folder(settings: DataSettings, folder: Path) -> Manifest:
    """List the images of both splits; nothing is copied, and nothing hashed unless asked for.

    Raises:
        DataError: a folder is missing or empty, a file is empty, or the splits' classes differ.
    """
    root = Path(settings.root or "")
    classes = _classes(root / settings.train)
    if (other := _classes(root / settings.test)) != classes:
        odd = sorted(set(classes) ^ set(other))
        raise DataError(f"{root}: {settings.train} and {settings.test} differ in their classes: {', '.join(odd[:5])}")
    splits = {
        "train": _entries(root, settings.train, classes, settings.hash_files),
        "test": _entries(root, settings.test, classes, settings.hash_files),
    }
    return write_manifest(
        folder,
        name=settings.name,
        source="folder",
        classes=classes,
        splits=splits,
        calibration=choose_calibration(settings.calibration, len(splits["train"]), settings.calibration_seed),
        extra={"root": str(root)},
    )


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected {folder}/<class>/<image>")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/<class>/<image>")
    return classes


def _entries(root: Path, split: str, classes: list[str], hash_files: bool) -> list[Entry]:
    found = []
    for label, name in enumerate(bar(classes, f"listing {split}")):
        paths = sorted(p for p in (root / split / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{root / split / name} holds no image ({', '.join(sorted(SUFFIXES))})")
        for path in paths:
            size = path.stat().st_size
            if not size:
                raise DataError(f"{path} is empty")
            digest = file_digest(path) if hash_files else ""
            found.append(Entry(path.relative_to(root).as_posix(), label, size, digest))
    return found


class ImageFolder:
    """Images decoded when asked for, through the transforms that timm resolves for the model.

    Args:
        manifest: from :func:`prepare_folder`.
        transform: size, mean, std, crop and interpolation (:func:`maskllm4v.models.image_settings`).
    """

    def __init__(self, manifest: Manifest, *, transform: dict[str, Any]) -> None:
        from timm.data import create_transform

        self.manifest, self.root = manifest, Path(manifest.extra["root"])
        size, options = transform["input_size"], {k: transform[k] for k in ("interpolation", "mean", "std")}
        self._mode = "L" if size[0] == 1 else "RGB"
        self._plain: Callable[[Any], Tensor] = create_transform(size, crop_pct=transform["crop_pct"], **options)
        self._augmented: Callable[[Any], Tensor] = create_transform(size, is_training=True, **options)

    def labels(self, split: str) -> Tensor:
        return torch.from_numpy(self.manifest.labels(split))

    def images(self, split: str, indices: np.ndarray, augment: np.random.Generator | None) -> Tensor:
        entries = [self.manifest.splits[split][int(i)] for i in indices]
        if augment is None:
            return torch.stack([self._plain(self._decode(entry)) for entry in entries])
        seeds = augment.integers(2**31, size=len(entries))
        images = []
        for entry, seed in zip(entries, seeds, strict=True):
            with _seeded(int(seed)):
                images.append(self._augmented(self._decode(entry)))
        return torch.stack(images)

    def _decode(self, entry: Entry) -> Any:
        from PIL import Image

        path = self.root / entry.path
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # converting would clip nearly all of it to white
                    raise DataError(f"{path} has more than 8 bits a channel; convert it first")
                if "transparency" in image.info:
                    return image.convert("RGBA").convert(self._mode)
                return image.convert(self._mode)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """timm's transforms draw from the global generators: seed all three, and put them back afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
