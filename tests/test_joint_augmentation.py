"""Pictures, masks and boxes at a model's size: they stay together, whatever is done to them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_files import TRANSFORM, coco_settings, draw_coco, draw_masks, masks_settings, opened
from images import same
from PIL import Image
from torch import Tensor

from maskllm4v.config import DataSettings, JointAugmentationSettings, parse_section
from maskllm4v.data import open_annotated, prepare
from maskllm4v.data.annotated import IGNORED, NONE, AnnotatedBatch
from maskllm4v.data.annotated_files import AnnotatedFiles
from maskllm4v.data.batches import plain_loader, step_loader
from maskllm4v.data.joint import Augmentation, ModelInput, Sample
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import generator
from maskllm4v.utils.sharding import BatchShard

EVERYTHING: dict[str, Any] = {"hflip": 0.5, "scale_jitter": (0.4, 2.0), "color_jitter": 0.4}
CROPS: dict[str, Any] = {"hflip": 0.5, "crop_scale": (0.1, 0.6), "color_jitter": 0.4}
KINDS = ("masks", "coco")


def source(kind: str, folder: Path) -> DataSettings:
    if kind == "masks":
        return masks_settings(draw_masks(folder / kind))
    return coco_settings(draw_coco(folder / kind))


def wanted(height: int, width: int, mode: str = "squash", **values: Any) -> ModelInput:
    return ModelInput.of({**TRANSFORM, "input_size": (3, height, width), "mode": mode, **values})


def drawn(height: int, width: int, objects: int, seed: int) -> Sample:
    """Disjoint rectangles, each of a colour and a class of its own, with their boxes; all else is black and 0."""
    draw = np.random.default_rng(seed)
    image, mask = np.zeros((3, height, width), np.uint8), np.zeros((height, width), np.uint8)
    boxes = []
    for i in range(objects):  # one per column of a grid
        left, right = np.sort(draw.choice(np.arange(width // objects + 1), 2, replace=False)) + i * (width // objects)
        top, bottom = np.sort(draw.choice(np.arange(height + 1), 2, replace=False))
        image[:, top:bottom, left:right] = 40 * (i + 1)
        mask[top:bottom, left:right] = i + 1
        boxes.append((left, top, right, bottom))
    classes = torch.arange(1, objects + 1)
    return Sample.of(torch.from_numpy(image), torch.from_numpy(mask), torch.tensor(boxes), classes)


def extents(mask: np.ndarray) -> dict[int, tuple[int, int, int, int]]:
    """The box around each class's pixels."""
    found = {}
    for number in set(np.unique(mask).tolist()) - {0, IGNORED}:
        rows, columns = np.nonzero((mask == number).any(1))[0], np.nonzero((mask == number).any(0))[0]
        found[number] = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return found


def arrays(sample: Sample) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    assert sample.mask is not None
    boxes = dict(zip(sample.classes.tolist(), np.asarray(sample.boxes), strict=True))
    return np.asarray(sample.image), np.asarray(sample.mask)[0], boxes


def test_flip_is_that_of_numpy() -> None:
    sample = drawn(24, 32, 4, seed=0)
    flipped = Augmentation(JointAugmentationSettings(hflip=1.0), wanted(24, 32))(sample)
    (image, mask, boxes), (before, mask_before, boxes_before) = arrays(flipped), arrays(sample)
    assert np.array_equal(image, before[:, :, ::-1])
    assert np.array_equal(mask, mask_before[:, ::-1])
    for number, (left, top, right, bottom) in boxes_before.items():
        assert boxes[number].tolist() == [32 - right, top, 32 - left, bottom]
    assert {number: tuple(map(int, box)) for number, box in boxes.items()} == extents(mask)


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each pixel takes the one that its centre lies in."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[rows][:, columns]


@pytest.mark.parametrize("size", [(24, 32), (7, 50), (48, 16), (96, 128)])
def test_resizing_is_that_of_numpy(size: tuple[int, int]) -> None:
    sample = drawn(24, 32, 4, seed=1)
    image, mask, boxes = arrays(wanted(*size).plain(sample))
    before, mask_before, boxes_before = arrays(sample)
    assert np.array_equal(mask, nearest(mask_before, size))
    for number, box in boxes_before.items():
        assert np.allclose(boxes[number], box * (np.array(size)[[1, 0, 1, 0]] / (32, 24, 32, 24)), atol=1e-4)
    pillow = Image.fromarray(before.transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.abs(image.transpose(1, 2, 0).astype(int) - np.asarray(pillow)).max() <= 1


@pytest.mark.parametrize("shape", [(24, 32), (60, 20), (20, 60), (3, 90)])
def test_letterbox_keeps_the_shape_and_pads_on_the_right_or_below(shape: tuple[int, int]) -> None:
    taken = wanted(24, 32, "letterbox")
    plain = taken.plain(drawn(*shape, 2, seed=2))
    sample, valid = taken.finished(plain), plain.size
    ratio = min(24 / shape[0], 32 / shape[1])
    assert valid == (round(shape[0] * ratio), round(shape[1] * ratio))
    image, mask, _ = arrays(sample)
    assert image.shape == (3, 24, 32)
    assert (mask[: valid[0], : valid[1]] != IGNORED).all()
    for padding in (np.s_[valid[0] :, :], np.s_[:, valid[1] :]):
        assert (mask[padding] == IGNORED).all()
        assert (image[:, *padding] == 0).all()
    if valid != (24, 32):
        assert (mask == IGNORED).any()


@pytest.mark.parametrize("settings", [EVERYTHING, CROPS], ids=["scale jitter", "crops"])
def test_boxes_are_around_what_is_left_of_their_pixels(settings: dict[str, Any]) -> None:
    """To a pixel, since masks are of whole pixels; objects that are gone have no box, and those left have one."""
    augment, torch_seeds = Augmentation(JointAugmentationSettings(**settings), wanted(48, 64)), range(60)
    lost = kept = 0
    for seed in torch_seeds:
        torch.manual_seed(seed)
        sample = augment(drawn(50, 70, 3, seed))
        height, width = sample.size
        assert height <= 48
        assert width <= 64
        _, mask, boxes = arrays(sample)
        around = extents(mask)
        for number, box in boxes.items():
            assert 0 <= box[0] < box[2] <= width
            assert 0 <= box[1] < box[3] <= height
            if number in around:
                assert np.abs(box - around[number]).max() <= 1.01
        for number in {1, 2, 3} - set(boxes):
            left, top, right, bottom = around.get(number, (0, 0, 0, 0))
            assert min(right - left, bottom - top) <= 2  # a sliver at most
        lost, kept = lost + 3 - len(boxes), kept + len(boxes)
    assert lost > 10
    assert kept > 60


def test_colours_change_and_geometry_does_not() -> None:
    sample = drawn(24, 32, 3, seed=0)
    changed = Augmentation(JointAugmentationSettings(color_jitter=0.5), wanted(24, 32))(sample)
    (image, mask, boxes), (before, mask_before, boxes_before) = arrays(changed), arrays(sample)
    assert not np.array_equal(image, before)
    assert np.array_equal(mask, mask_before)
    assert {k: v.tolist() for k, v in boxes.items()} == {k: v.tolist() for k, v in boxes_before.items()}


def test_images_are_normalised_and_come_back(tmp_path: Path) -> None:
    data = opened(source("masks", tmp_path), tmp_path / "m", mode="letterbox")
    batch = data.batch("test", np.arange(3), None)
    pixels = data.pixels(batch.images)
    assert pixels.dtype is torch.uint8
    for image, shown, (height, width) in zip(batch.images, pixels, batch.valid.tolist(), strict=True):
        own = image[:, :height, :width]
        expected = (shown[:, :height, :width] / 255 - data.mean) / data.std
        assert torch.allclose(own, expected, atol=1e-5)
    assert abs(float(pixels.float().mean()) - 127) < 10


def test_truth_has_the_size_of_the_files(tmp_path: Path) -> None:
    settings = source("masks", tmp_path)
    batch = opened(settings, tmp_path / "m").batch("test", np.array([2, 0]), None)
    height, width = batch.sizes.amax(0).tolist()
    assert batch.truth.shape == (2, height, width)
    for found, name, size in zip(batch.truth, ("2.png", "0.png"), batch.sizes.tolist(), strict=True):
        with Image.open(tmp_path / "masks/masks/test" / name) as image:
            stored = np.asarray(image)
        assert list(stored.shape) == size
        assert np.array_equal(found[: size[0], : size[1]], stored)
        assert (found[size[0] :] == IGNORED).all()
        assert (found[:, size[1] :] == IGNORED).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [EVERYTHING, CROPS], ids=["scale jitter", "crops"])
def test_batches_are_a_function_of_seed_and_step(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Whatever the workers, the step that a run is resumed at, and the parts that batches are computed in."""
    data = opened(source(kind, tmp_path), tmp_path / "m", **settings)

    def batches(seed: int = 0, **values: Any) -> list[AnnotatedBatch]:
        return list(step_loader(data, **{"seed": seed, "batch_size": 4, "steps": 3, **values}))

    first = batches()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert same(first, batches(workers=2))
    assert same(first[1:], batches(start=1))
    assert not same(first, batches(seed=1))
    parts = [batches(shard=BatchShard(2, range(i, i + 1))) for i in range(2)]
    for whole, *own in zip(first, *parts, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in own]))
        assert torch.equal(whole.masks, torch.cat([part.masks for part in own]))
        assert kept(whole.boxes, whole.classes) == [one for part in own for one in kept(part.boxes, part.classes)]


def kept(boxes: Tensor, classes: Tensor) -> list[list[list[float]]]:
    """Boxes of each image without what fills the batch up."""
    return [own[numbers != NONE].tolist() for own, numbers in zip(boxes, classes, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_depend_on_workers(tmp_path: Path, kind: str) -> None:
    data = opened(source(kind, tmp_path), tmp_path / "m", **EVERYTHING)
    found = [list(plain_loader(data, "train", np.arange(6), 4, workers)) for workers in (0, 2)]
    assert same(*found)
    assert len(found[0]) == 2


def test_images_of_a_batch_are_augmented_differently_and_generators_are_left_alone(tmp_path: Path) -> None:
    data = opened(source("masks", tmp_path), tmp_path / "m", **CROPS)
    before = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    batch = data.batch("train", np.array([3, 3]), generator(0, "augment", 0))
    assert not torch.equal(batch.images[0], batch.images[1])
    assert not torch.equal(batch.masks[0], batch.masks[1])
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


def test_grey_models_get_one_channel(tmp_path: Path) -> None:
    settings = source("masks", tmp_path)
    prepare(settings, tmp_path / "m")
    grey = {"input_size": (1, 24, 32), "mean": (0.5,), "std": (0.2,)}
    data = open_annotated(tmp_path / "m", settings, JointAugmentationSettings(), grey, needs="masks")
    assert isinstance(data, AnnotatedFiles)
    assert data.batch("test", np.arange(2), None).images.shape == (2, 1, 24, 32)


def test_scenes_are_neither_augmented_nor_resized(tmp_path: Path) -> None:
    settings = DataSettings(name="s", source="scenes", scenes={"train": 4, "test": 2}, calibration=2)
    prepare(settings, tmp_path / "m")

    def scenes(size: int = 32, **values: Any) -> Any:
        taken = {"input_size": (1, size, size), "mean": (0.5,), "std": (0.2,)}
        return open_annotated(tmp_path / "m", settings, JointAugmentationSettings(**values), taken, needs="boxes")

    batch = scenes().batch("test", np.arange(2), None)
    assert batch.valid.tolist() == batch.sizes.tolist() == [[32, 32]] * 2
    assert torch.equal(batch.truth, batch.masks)
    with pytest.raises(ConfigError, match=r"task\.hflip is not for data\.source 'scenes'"):
        scenes(hflip=0.5)
    with pytest.raises(ConfigError, match=r"scenes are \[1, 32, 32\] .*, but the model takes \[1, 48, 48\]"):
        scenes(48)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_scale": [0.5, 1.0], "scale_jitter": [0.5, 2.0]}, "one of crop_scale and scale_jitter, not both"),
        ({"scale_jitter": [2.0, 0.5]}, r"scale_jitter is \[2\.0, 0\.5\]: first the least"),
        ({"crop_scale": [0.5, 1.5]}, r"crop_scale is \[0\.5, 1\.5\]; allowed: shares"),
        ({"hflip": 2.0}, r"hflip is 2\.0"),
    ],
)
def test_wrong_augmentation_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(JointAugmentationSettings, values)


@pytest.mark.parametrize(("key", "value"), [("mode", "crop"), ("interpolation", "cubic")])
def test_unknown_input_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.input\.{key} is '{value}'; allowed: "):
        ModelInput.of({**TRANSFORM, key: value})
