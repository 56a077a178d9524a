"""Images in memory: shifts, flips, borders, normalisation, other sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import TRANSFORM, digits_settings, draw_folder, everything, folder_settings, open_digits, prepared
from torch import Tensor

from maskllm4v.config import AugmentationSettings
from maskllm4v.data import ImageData, Manifest, prepare
from maskllm4v.data.arrays import ArrayImages
from maskllm4v.data.manifest import Entry
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import generator

COUNT = 40
MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare(digits_settings(), folder)
    return folder


@pytest.fixture
def digits(digits_folder: Path) -> ImageData:
    return open_digits(digits_folder)


# Shifts of digits, whose surroundings are background


def shifted(image: Tensor, dy: int, dx: int, background: float) -> Tensor:
    """Pixel by pixel: what is at (y + dy, x + dx), or the background beyond the border."""
    out = torch.full_like(image, background)
    for y in range(8):
        for x in range(8):
            if 0 <= y + dy < 8 and 0 <= x + dx < 8:
                out[0, y, x] = image[0, y + dy, x + dx]
    return out


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_shift_equals_a_slow_one(digits_folder: Path, digits: ImageData, shift: int, probability: float) -> None:
    data = open_digits(digits_folder, shift=shift, shift_probability=probability)
    extra = data.manifest.extra
    indices = np.arange(60)
    found = data.images("train", indices, generator(3, "augment", 5))
    assert found.is_contiguous()
    draw = generator(3, "augment", 5)
    vertical = draw.integers(0, 2 * shift + 1, size=60) - shift
    horizontal = draw.integers(0, 2 * shift + 1, size=60) - shift
    moves = draw.random(60) < probability
    assert vertical.var() * horizontal.var() > 0
    assert moves.all() == (probability == 1.0)
    plain = digits.images("train", indices, None)
    for i in indices:
        dy, dx = (int(vertical[i]), int(horizontal[i])) if moves[i] else (0, 0)
        assert torch.equal(found[i], shifted(plain[i], dy, dx, -extra["mean"] / extra["std"])), i


def test_every_shift_occurs_about_equally_often(digits_folder: Path, digits: ImageData) -> None:
    data = open_digits(digits_folder, shift=1)
    index = next(i for i in range(898) if (everything(digits, "train")[i, 0] > 0).sum() > 20)
    plain, low = digits.images("train", np.array([index]), None)[0], float(everything(digits, "train").min())
    known = {(dy, dx): shifted(plain, dy, dx, low) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    found = data.images("train", np.full(900, index), generator(0, "augment", 0))
    hits = Counter(move for image in found for move, other in known.items() if torch.allclose(image, other))
    assert sum(hits.values()) == 900
    assert len(hits) == 9
    assert min(hits.values()) > 60


@pytest.mark.parametrize("options", [{"shift": 2, "shift_probability": 0.0}, {"shift": 0}, {}])
def test_no_shift(digits_folder: Path, digits: ImageData, options: dict[str, Any]) -> None:
    data = open_digits(digits_folder, **options)
    found = data.images("train", np.arange(898), generator(0, "augment", 0))
    assert torch.equal(found, everything(digits, "train"))


def test_augmentation_leaves_the_images_alone(digits_folder: Path, digits: ImageData) -> None:
    data = open_digits(digits_folder, shift=2)
    data.images("train", np.arange(898), generator(0, "augment", 0)).fill_(7.0)
    data.images("train", np.arange(898), None).fill_(7.0)
    assert torch.equal(everything(data, "train"), everything(digits, "train"))


# Photographs: bytes, whose surroundings are their reflection


def pixels() -> Tensor:
    draw = np.random.default_rng(1)
    return torch.from_numpy(draw.integers(0, 256, size=(COUNT, 3, 8, 10), dtype=np.uint8))


def photographs(**task: Any) -> ArrayImages:
    entries = [Entry(str(i), i % 2, 1, "") for i in range(COUNT)]
    manifest = Manifest("photos", "folder", ("a", "b"), {"train": entries}, [], "train", {}, "")
    return ArrayImages(manifest, lambda split: pixels(), AugmentationSettings(**task), mean=MEAN, std=STD)


def normalised(images: np.ndarray) -> Tensor:
    values = images / 255 - np.reshape(MEAN, (3, 1, 1))
    return torch.from_numpy(values / np.reshape(STD, (3, 1, 1))).float()


def test_bytes_are_scaled_and_normalised() -> None:
    found = everything(photographs(), "train")
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, normalised(pixels().numpy()))
    assert photographs().labels("train").tolist() == [0, 1] * 20


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("hflip", [0.0, 0.5, 1.0])
def test_shifts_and_flips_equal_slow_ones(shift: int, hflip: float) -> None:
    found = photographs(shift=shift, shift_probability=0.75, hflip=hflip).images(
        "train", np.arange(COUNT), generator(3, "augment", 5)
    )
    draw, (dy, dx) = generator(3, "augment", 5), np.full((2, COUNT), shift)
    if shift:
        offsets, moves = draw.integers(0, 2 * shift + 1, size=(2, COUNT)), draw.random(COUNT) < 0.75
        assert 0 < moves.sum() < COUNT
        dy, dx = np.where(moves, offsets, shift)
    flips = draw.random(COUNT) < hflip
    assert flips.sum() in {0.0: [0], 0.5: range(10, 31), 1.0: [COUNT]}[hflip]
    for i, image in enumerate(pixels().numpy()):
        framed = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        moved = framed[:, dy[i] : dy[i] + 8, dx[i] : dx[i] + 10]
        torch.testing.assert_close(found[i], normalised(moved[:, :, ::-1] if flips[i] else moved), msg=str(i))


def test_augmentation_of_a_part_is_that_of_the_whole() -> None:
    data, indices = photographs(shift=2, shift_probability=0.5, hflip=0.5), np.arange(COUNT)[::-1].copy()
    whole = data.images("train", indices, generator(0, "x"))
    parts = [data.images("train", indices, generator(0, "x"), slice(i, i + 8)) for i in range(0, COUNT, 8)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, data.images("train", indices, None))


@pytest.mark.parametrize("task", [{"auto_augment": "rand-m8"}, {"random_erasing": 0.1}])
def test_augmentation_of_decoded_images_is_refused(task: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"task\.auto_augment .* not for images that are kept in memory"):
        photographs(**task)


def test_resized_images_have_the_size_and_all_else_of_the_large_ones(tmp_path: Path) -> None:
    large = photographs(hflip=1.0)
    small = large.resized(5)
    assert everything(small, "train").shape == (COUNT, 3, 5, 5)
    assert everything(large, "train").shape == (COUNT, 3, 8, 10)
    flipped = small.images("train", np.arange(COUNT), generator(0, "x"))
    assert torch.equal(flipped, everything(small, "train").flip(-1))
    flat = torch.full((COUNT, 3, 8, 10), 77, dtype=torch.uint8)
    level = ArrayImages(large.manifest, lambda split: flat, AugmentationSettings(), mean=MEAN, std=STD).resized(4)
    torch.testing.assert_close(everything(level, "train"), normalised(np.full((COUNT, 3, 4, 4), 77)))


def test_resized_digits_keep_their_background(digits_folder: Path) -> None:
    small = open_digits(digits_folder, shift=1).resized(4)
    found = small.images("train", np.arange(60), generator(0, "x"))
    assert found.shape == (60, 1, 4, 4)
    extra = small.manifest.extra
    low = torch.tensor(-extra["mean"] / extra["std"])
    rows = [image[0, 0] for image in found if torch.allclose(image[0, 0], low)]
    assert len(rows) > 10  # moved down by one


def test_resizing_averages(digits: ImageData) -> None:
    large, small = everything(digits, "test"), everything(digits.resized(4), "test")
    torch.testing.assert_close(small.mean(), large.mean(), atol=0.05, rtol=0)
    assert small.std() < large.std()


# Folders that are kept


def test_images_in_memory_are_timms(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "pets")
    kept = prepared(folder_settings(root, in_memory=32), tmp_path / "a")
    decoded = prepared(folder_settings(root), tmp_path / "b")
    assert isinstance(kept, ArrayImages)
    assert not isinstance(decoded, ArrayImages)
    for split in ("train", "test"):
        torch.testing.assert_close(everything(kept, split), everything(decoded, split))
        assert torch.equal(kept.labels(split), decoded.labels(split))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_are_decoded_once(channels: int, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "pets")
    transform = {**TRANSFORM, "input_size": (channels, 32, 32), "mean": (0.5,) * channels, "std": (0.5,) * channels}
    data = prepared(folder_settings(root, in_memory=16), tmp_path / "m", transform, shift=2, hflip=0.5)
    before = everything(data, "train")
    assert before.shape == (11, channels, 16, 16)
    for path in (root / "train").glob("*/*.png"):
        path.unlink()
    assert torch.equal(everything(data, "train"), before)
    assert data.images("train", np.arange(11), generator(0, "x")).shape == before.shape
