"""Small image sources that the tests of the data room share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskllm4v.config import AugmentationSettings, DataSettings
from maskllm4v.data import ImageData, open_data, prepare
from maskllm4v.tasks.classification.models import image_settings
from maskllm4v.tasks.classification.settings import TimmSettings

TRANSFORM = image_settings(TimmSettings(name="vit_tiny_patch16_224", args={"img_size": 32}))
COUNTS = {"train": (5, 6), "val": (2, 2)}


def digits_settings(**values: Any) -> DataSettings:
    return DataSettings(**{"name": "digits", "source": "digits", **values})


def open_digits(folder: Path, **task: Any) -> Any:
    """A folder of a prepared digits manifest."""
    return open_data(folder, digits_settings(), AugmentationSettings(**task), {})


def draw_folder(root: Path, counts: Mapping[str, tuple[int, int]] = COUNTS) -> Path:
    """An image folder: cats and dogs, so many of each in each split, 36×40 pixels, all different."""
    draw = np.random.default_rng(0)
    for split, numbers in counts.items():
        for name, count in zip(("cat", "dog"), numbers, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def folder_settings(root: Path, **values: Any) -> DataSettings:
    return DataSettings(**{"name": "pets", "source": "folder", "root": str(root), "calibration": 2, **values})


def prepared(settings: DataSettings, folder: Path, transform: Mapping[str, Any] = TRANSFORM, **task: Any) -> ImageData:
    """Prepare a source and open it."""
    prepare(settings, folder)
    return open_data(folder, settings, AugmentationSettings(**task), transform)


def everything(data: ImageData, split: str) -> Tensor:
    return data.images(split, np.arange(len(data.manifest.splits[split])), None)


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of batches hold the same bits."""
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )
