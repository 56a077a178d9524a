"""Pictures of coloured rectangles with masks or boxes, and a tiny random model, where a recipe looks for them.

    python scripts/made_pictures.py RECIPE [--folder .]

RECIPE is a table of ``experiments/`` whose ``data.source`` is ``masks`` or ``coco``; its paths are made below FOLDER.
Twenty pictures to train on and eight to test on, of several sizes; the first of each split shows nothing. The same
files each time. What is there already stays: then nothing is made.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rehearsal
import tiny_models
from PIL import Image

COUNTS = {"train": 20, "test": 8}
SIZES = ((72, 96), (96, 72), (80, 80))  # height and width, in turn
MOST = 3  # rectangles in a picture
SHOWN = 5  # classes that pictures show, however many the model has


class Made(NamedTuple):
    """A picture, and its rectangles: a class and left, top, width and height of each. Later ones lie on top."""

    pixels: np.ndarray
    rectangles: list[tuple[int, tuple[int, int, int, int]]]


def made(split: str, classes: int) -> Iterator[Made]:
    """The pictures of a split; rectangles are of the first classes, each of one colour."""
    draw = np.random.default_rng([*split.encode()])
    colours = np.random.default_rng(0).integers(64, 256, (classes, 3))
    for number in range(COUNTS[split]):
        height, width = SIZES[number % len(SIZES)]
        pixels = draw.integers(0, 64, (height, width, 3)).astype(np.uint8)
        rectangles = []
        for _ in range(number % (MOST + 1)):
            kind, w, h = int(draw.integers(classes)), int(draw.integers(16, 40)), int(draw.integers(16, 40))
            x, y = int(draw.integers(width - w)), int(draw.integers(height - h))
            pixels[y : y + h, x : x + w] = colours[kind]
            rectangles.append((kind, (x, y, w, h)))
        yield Made(pixels, rectangles)


def lay_out(params: dict[str, Any], folder: Path) -> None:
    """Write pictures and model below a folder.

    Raises:
        SystemExit: the pictures' or the model's folder is there, or the recipe is of another kind.
    """
    data, model = params["data"], params["model"]
    if data["source"] not in ("masks", "coco"):
        sys.exit(f"data.source is {data['source']!r}; pictures are made for 'masks' and 'coco'")
    root, weights = folder / data["root"], folder / model["folder"]
    for path in (root, weights):
        if path.exists():
            sys.exit(f"{path} is there; nothing was made")
    (lay_out_masks if data["source"] == "masks" else lay_out_boxes)(params, root)
    tiny_models.save(model["name"], class_names(params), weights)
    print(f"{root}: {COUNTS['train']} pictures to train on, {COUNTS['test']} to test on; {weights}: {model['name']}")


def class_names(params: dict[str, Any]) -> list[str]:
    """Of the model: as the recipe lists them, or ``class 0`` and so on."""
    listed = params["data"].get("classes")
    return listed if isinstance(listed, list) else [f"class {i}" for i in range(params["model"]["classes"])]


def lay_out_masks(params: dict[str, Any], root: Path) -> None:
    """Index masks: class 0 is the ground, rectangles are the next ones; a frame of two pixels belongs to no class."""
    data, classes = params["data"], params["model"]["classes"]
    ending, zero = data.get("image_suffix") or ".jpg", bool(data.get("zero_is_ignored"))
    for split in COUNTS:
        for number, (pixels, rectangles) in enumerate(made(split, min(classes - 1, SHOWN))):
            mask = np.zeros(pixels.shape[:2], np.uint8)
            for kind, (x, y, w, h) in rectangles:
                mask[y : y + h, x : x + w] = 1 + kind
            mask = mask + zero
            mask[:2] = mask[-2:] = mask[:, :2] = mask[:, -2:] = 0 if zero else data.get("ignored", 255)
            name = f"made/{split}_{number:04d}"
            save(root / data[split] / f"{name}{ending}", pixels)
            save(root / data["masks"][split] / f"{name}{data.get('suffix', '.png')}", mask)
    if isinstance(data["classes"], str) and not (root / data["classes"]).exists():
        (root / data["classes"]).write_text("".join(f"{name}\n" for name in class_names(params)))


def lay_out_boxes(params: dict[str, Any], root: Path) -> None:
    """COCO's JSON, ids from 1 on; categories are the model's first classes."""
    data = params["data"]
    classes = data.get("classes") or min(params["model"]["classes"], SHOWN)
    for split in COUNTS:
        images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        for number, (pixels, rectangles) in enumerate(made(split, min(classes, SHOWN)), 1):
            name = f"{split}_{number:04d}.jpg"
            save(root / data[split] / name, pixels)
            height, width = pixels.shape[:2]
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for kind, (x, y, w, h) in rectangles:
                box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                place = {"id": len(annotations) + 1, "image_id": number, "category_id": kind + 1}
                annotations.append(place | box)
        categories = [{"id": kind + 1, "name": name} for kind, name in enumerate(class_names(params)[:classes])]
        path = root / data["annotations"][split]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def save(path: Path, pixels: np.ndarray) -> None:
    """A JPEG or PNG, as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--folder", type=Path, default=Path("."))
    arguments = parser.parse_args()
    lay_out(rehearsal.experiment(arguments.recipe), arguments.folder)


if __name__ == "__main__":
    main()
