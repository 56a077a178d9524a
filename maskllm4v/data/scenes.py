"""Scenes of scikit-learn's digits on a textured ground: pictures with masks and boxes, for every machine.

A scene is a pure function of (seed, split, index): integer arithmetic on Philox draws, so that its bytes depend on no
CPU, pinned or not. The digit images are split into stratified halves first: none is in scenes of both splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.config import DataSettings, JointAugmentationSettings, SceneSettings
from maskllm4v.data.annotated import AnnotatedArrays, ArraysInMemory, annotated_entries, load_arrays, save_arrays
from maskllm4v.data.digits import digit_images
from maskllm4v.data.manifest import Manifest, write_manifest
from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.rng import generator

LEVELS = 16  # of ink in scikit-learn's images
THRESHOLD = 5  # of LEVELS: from here on, a pixel belongs to the digit
REDRAWS = 100  # of a scene with too few digits, before it is an error
GROUND_NAME = "ground"
GROUND = (8, 72, 24)  # cells a side of the coarse texture, its range, and the range of the fine one
BRIGHTNESS = (144, 256)
MEAN, STD = 0.25, 0.165  # that images are normalised with, in a range of [0, 1]; about those of the defaults

Scene = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # image, mask, boxes, classes


def prepare_scenes(settings: DataSettings, folder: Path) -> Manifest:
    """Make the scenes of both splits, write them to ``folder``, and their manifest beside them."""
    images, labels = digit_images()
    splits, files = {}, {}
    for split, count in (("train", settings.scenes.train), ("test", settings.scenes.test)):
        own = half_of_digits(labels, split, settings.split_seed)
        made = [
            make_scene(images[own], labels[own], generator(settings.split_seed, "scene", split, i), settings.scenes)
            for i in range(count)
        ]
        arrays = AnnotatedArrays.of(*zip(*made, strict=True))
        files[split] = save_arrays(folder / f"{split}.safetensors", vars(arrays))
        splits[split] = annotated_entries(arrays)
    classes = [str(digit) for digit in range(10)]
    return write_manifest(
        folder,
        settings=settings,
        classes=classes,
        splits=splits,
        extra={"files": files, "mask_classes": [GROUND_NAME, *classes], "mean": MEAN, "std": STD},
    )


def open_scenes(
    manifest: Manifest,
    folder: Path,
    settings: SceneSettings,
    augmentation: JointAugmentationSettings,
    transform: Mapping[str, Any],
) -> ArraysInMemory:
    """The scenes behind a manifest; those held out are taken from the training split's file.

    Raises:
        ConfigError: they are to be augmented, or brought to another size.
        DataError: when a split is first needed: its file is missing, or not the one that the manifest describes.
    """

    if changed := set(JointAugmentationSettings.model_fields) & set(augmentation.beyond_defaults()):
        raise ConfigError(f"task.{min(changed)} is not for data.source 'scenes', which are not augmented")
    if tuple(transform["input_size"]) != (size := (1, settings.size, settings.size)):
        wanted = list(transform["input_size"])
        raise ConfigError(f"scenes are {list(size)} (channels, height, width), but the model takes {wanted}")

    def load(split: str) -> AnnotatedArrays:
        source = "train" if split == "holdout" else split
        arrays = AnnotatedArrays(**load_arrays(folder / f"{source}.safetensors", manifest.extra["files"][source]))
        return arrays.subset(np.array([int(entry.path) for entry in manifest.splits[split]], dtype=np.int64))

    return ArraysInMemory(manifest, load, mean=manifest.extra["mean"], std=manifest.extra["std"])


def half_of_digits(labels: np.ndarray, split: str, seed: int) -> np.ndarray:
    """Indices of the digit images that a split's scenes are made of: every other one of each class, shuffled."""
    order = generator(seed, "digits").permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return order[(split != "train") :: 2]


def make_scene(pool: np.ndarray, labels: np.ndarray, draws: np.random.Generator, settings: SceneSettings) -> Scene:
    """One scene; digits that find no free place are left out, and where too few are left, another scene is drawn.

    Args:
        pool: digit images ``[n, 8, 8]``, integers of 0 to :data:`LEVELS`.
        labels: their classes ``[n]``.
        draws: all that is random about it.
        settings: its size, the sizes of digits and how many there are.

    Returns:
        image: uint8 ``[1, H, W]``.
        mask: uint8 ``[H, W]``; 0 is the ground, ``1 + class`` a digit.
        boxes: int64 ``[objects, 4]``: left, top, right, bottom in pixels, the latter two exclusive.
        classes: int64 ``[objects]``.

    Raises:
        DataError: so many digits do not fit into a scene.
    """
    for _ in range(REDRAWS):
        image, mask, boxes, classes = _draw(pool, labels, draws, settings)
        if len(boxes) >= settings.digits[0]:
            found = np.array(boxes, np.int64).reshape(-1, 4), np.array(classes, np.int64)
            return image.astype(np.uint8)[None], mask, *found
    fewest, side = settings.digits[0], settings.size
    raise DataError(f"data.scenes: {fewest} digits of {settings.sides} pixels do not fit into a scene of {side} pixels")


def _draw(
    pool: np.ndarray, labels: np.ndarray, draws: np.random.Generator, settings: SceneSettings
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int]], list[int]]:
    size, (cells, coarse, fine) = settings.size, GROUND
    image = enlarge(draws.integers(0, coarse, (cells, cells)), size) // (2 * size) ** 2
    image = image + draws.integers(0, fine, (size, size))
    mask, taken = np.zeros((size, size), np.uint8), np.zeros((size, size), bool)
    boxes: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    for _ in range(int(draws.integers(settings.digits[0], settings.digits[1] + 1))):
        which, side = int(draws.integers(len(pool))), settings.sides[int(draws.integers(len(settings.sides)))]
        ink, unit, bright = enlarge(pool[which], side), (2 * side) ** 2, int(draws.integers(*BRIGHTNESS))
        drawn = ink >= THRESHOLD * unit
        (top, bottom), (left, right) = _extent(drawn, axis=0), _extent(drawn, axis=1)
        places = free_places(taken, bottom - top, right - left)[
            top : top + size - side + 1, left : left + size - side + 1
        ]
        if not len(free := np.argwhere(places)):
            continue
        y, x = map(int, free[draws.integers(len(free))])
        place = np.s_[y : y + side, x : x + side]
        image[place] = np.maximum(image[place], bright * ink // (LEVELS * unit))
        mask[place][drawn] = 1 + labels[which]
        taken[y + top : y + bottom, x + left : x + right] = True
        boxes.append((x + left, y + top, x + right, y + bottom))
        classes.append(int(labels[which]))
    return image, mask, boxes, classes


def free_places(taken: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where a box may have its top left corner and cover nothing taken: bool ``[H - height + 1, W - width + 1]``."""
    sums = np.pad(taken.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    covered: np.ndarray = (
        sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    )
    return covered == 0


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """Bilinear interpolation of integers ``[n, n]`` to ``[side, side]``: the values times (2·side)², exactly."""
    n = len(image)
    place = (n * (2 * np.arange(side) + 1) - side).clip(0, 2 * side * (n - 1))  # in the source, times 2·side
    weights = (2 * side - np.abs(place[:, None] - 2 * side * np.arange(n))).clip(0)
    enlarged: np.ndarray = weights @ image @ weights.T
    return enlarged


def _extent(drawn: np.ndarray, axis: int) -> tuple[int, int]:
    """Along an axis, the first place where anything is drawn, and the one after the last."""
    found: Sequence[int] = np.flatnonzero(drawn.any(1 - axis)).tolist()
    return found[0], found[-1] + 1
