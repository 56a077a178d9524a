"""Small pictures with masks or boxes as files, for the tests of such sources."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskllm4v.config import DataSettings, JointAugmentationSettings
from maskllm4v.data import open_annotated, prepare
from maskllm4v.data.annotated_files import AnnotatedFiles

ORIENTATION = 0x0112  # of EXIF
NAMES = ["road", "car", "sky"]
TRANSFORM = {"input_size": (3, 24, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
COUNTS = {"train": 6, "test": 3}
CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 7, "name": "cat"}]  # not in order, and with gaps


def picture(number: int) -> np.ndarray:
    """Of its own size and colours, uint8 ``[h, w, 3]``."""
    draw = np.random.default_rng(number)
    height, width = draw.integers(20, 60, 2)
    return draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


def turn(path: Path, orientation: int) -> None:
    """Write a picture's pixels again, with EXIF's word that they are to be turned."""
    with Image.open(path) as image:
        exif = image.getexif()
        exif[ORIENTATION] = orientation
        pixels = image.copy()
    pixels.save(path, exif=exif)


def draw_masks(root: Path, values: Sequence[int] = (0, 1, 2, 255)) -> Path:
    """``pictures/<split>/<i>.png`` and ``masks/<split>/<i>.png``, the latter of random values."""
    for first, (split, count) in zip((0, 100), COUNTS.items(), strict=True):
        (root / "pictures" / split).mkdir(parents=True)
        (root / "masks" / split).mkdir(parents=True)
        for i in range(count):
            pixels = picture(first + i)
            Image.fromarray(pixels).save(root / "pictures" / split / f"{i}.png")
            found = np.random.default_rng(i).choice(values, pixels.shape[:2]).astype(np.uint8)
            Image.fromarray(found).save(root / "masks" / split / f"{i}.png")
    return root


def masks_settings(root: Path, **values: Any) -> DataSettings:
    places = {"train": "pictures/train", "test": "pictures/test"}
    masks = {"train": "masks/train", "test": "masks/test"}
    given = {"name": "own", "source": "masks", "root": str(root), "classes": NAMES, "calibration": 2}
    return DataSettings(**{**given, **places, "masks": masks, **values})


def draw_coco(root: Path) -> Path:
    """``train/``, ``test/`` and a JSON file of each; images have 0, 1, 2, … boxes, a third of the first is a crowd."""
    number = 0
    for first, (split, count) in zip((0, 100), COUNTS.items(), strict=True):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            pixels = picture(first + i)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            height, width = pixels.shape[:2]
            images.append({"id": 1000 - 10 * i, "file_name": f"{i}.png", "width": width, "height": height})
            draw = np.random.default_rng(first + i)
            for k in range(i):
                left, top = draw.uniform(0, width / 2), draw.uniform(0, height / 2)
                box = [left, top, draw.uniform(2, width / 2), draw.uniform(2, height / 2)]
                annotations.append(
                    {
                        **{"id": number, "image_id": images[-1]["id"], "category_id": (7, 90)[k % 2]},
                        **{"bbox": box, "area": box[2] * box[3] / 2, "iscrowd": int(k == 2)},
                    }
                )
                number += 1
        write_coco(root, split, {"images": images, "annotations": annotations, "categories": CATEGORIES})
    return root


def write_coco(root: Path, split: str, content: Any) -> None:
    (root / f"{split}.json").write_text(json.dumps(content))


def read_coco_json(root: Path, split: str) -> Any:
    return json.loads((root / f"{split}.json").read_text())


def coco_settings(root: Path, **values: Any) -> DataSettings:
    files = {"train": "train.json", "test": "test.json"}
    given = {"name": "own", "source": "coco", "root": str(root), "train": "train", "test": "test", "calibration": 2}
    return DataSettings(**{**given, "annotations": files, **values})


def opened(settings: DataSettings, folder: Path, *, mode: str = "squash", **augmentation: Any) -> AnnotatedFiles:
    """Prepare a source in ``folder`` and open it."""
    prepare(settings, folder)
    needs: Any = "masks" if settings.source == "masks" else "boxes"
    augmenting = JointAugmentationSettings(**augmentation)
    found = open_annotated(folder, settings, augmenting, {**TRANSFORM, "mode": mode}, needs=needs)
    assert isinstance(found, AnnotatedFiles)
    return found
