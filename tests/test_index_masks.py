"""Folders of pictures and index masks: what values mean, how files are matched, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_files import NAMES, TRANSFORM, draw_masks, masks_settings, opened, picture, turn
from PIL import Image

from maskllm4v.config import JointAugmentationSettings
from maskllm4v.data import open_annotated, open_data, prepare
from maskllm4v.data.annotated import IGNORED
from maskllm4v.utils.errors import ConfigError, DataError, UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_masks(tmp_path / "own")


def save(path: Path, values: Any, mode: str | None = None) -> None:
    image = Image.fromarray(np.asarray(values, np.uint8))
    (image if mode is None else image.convert(mode)).save(path)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def truth(root: Path, folder: Path, **values: Any) -> np.ndarray:
    """The first test picture's mask, at its own size."""
    data = opened(masks_settings(root, **values), folder)
    found: np.ndarray = data.batch("test", np.array([0]), None).truth[0].numpy()
    return found


def test_manifest_names_pictures_and_masks(root: Path, tmp_path: Path) -> None:
    found = prepare(masks_settings(root, hash_files=True), tmp_path / "m")
    assert found.classes == tuple(NAMES)
    assert [entry.path for entry in found.splits["test"]] == [f"pictures/test/{i}.png" for i in range(3)]
    for split in ("train", "test"):
        listed = (tmp_path / "m" / f"{split}_masks.csv").read_text().splitlines()[1:]
        for entry, line in zip(found.splits[split], listed, strict=True):
            path, label, size, digest = line.split(",")
            assert path == entry.path.replace("pictures", "masks")
            assert (root / path).stat().st_size == int(size)
            assert (label, len(digest), len(entry.sha256)) == (str(entry.label), 64, 64)
            with Image.open(root / path) as mask:
                assert entry.label == len(set(np.asarray(mask).ravel().tolist()) - {255})
    assert prepare(masks_settings(root, hash_files=True), tmp_path / "again").digest == found.digest


@pytest.mark.parametrize("hashed", [False, True])
def test_changed_mask_is_found(root: Path, tmp_path: Path, hashed: bool) -> None:
    settings = masks_settings(root, hash_files=hashed)
    before = prepare(settings, tmp_path / "m").digest
    path = root / "masks/test/1.png"
    save(path, np.zeros(size_of(path)[::-1]))
    with pytest.raises(DataError, match=r"masks/test/1\.png .*changed since"):
        opened_again(settings, tmp_path / "m").batch("test", np.arange(3), None)
    assert prepare(settings, tmp_path / "n").digest != before


def opened_again(settings: Any, folder: Path) -> Any:
    return open_annotated(folder, settings, JointAugmentationSettings(), TRANSFORM, needs="masks")


def test_palettes_keep_their_indices(root: Path, tmp_path: Path) -> None:
    """The palette of Pascal VOC, whose colours converted to grey are 38, 75, 113 … of 1, 2, 3 …"""
    colours = [
        sum(((number >> (3 * place + channel)) & 1) << (7 - place) for place in range(3))
        for number in range(256)
        for channel in range(3)
    ]
    expected = {}
    for path in sorted((root / "masks").rglob("*.png")):
        with Image.open(path) as image:
            expected[path] = np.asarray(image).copy()
        palette = Image.fromarray(expected[path], "P")
        palette.putpalette(colours)
        palette.save(path)
        assert not np.array_equal(np.asarray(palette.convert("L")), expected[path])
    assert np.array_equal(truth(root, tmp_path / "m"), expected[root / "masks/test/0.png"])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palettes_of_few_bits_keep_their_indices(root: Path, tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(0).integers(0, min(3, 2**bits), size_of(root / "masks/test/0.png")[::-1])
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([7, 7, 7, 90, 90, 90, 200, 0, 0])
    image.save(root / "masks/test/0.png", bits=bits)
    assert np.array_equal(truth(root, tmp_path / "m"), values)


def test_reduced_zero_label_of_ade20k(tmp_path: Path) -> None:
    root = draw_masks(tmp_path / "ade", values=(0, 1, 2, 3))
    with Image.open(root / "masks/test/0.png") as image:
        stored = np.asarray(image).astype(int)
    expected = np.where(stored == 0, IGNORED, stored - 1)
    assert np.array_equal(truth(root, tmp_path / "m", zero_is_ignored=True), expected)
    with pytest.raises(DataError, match=r"train/0\.png has the value 3 in .* no class; allowed: 0 to 2, and 255"):
        prepare(masks_settings(root), tmp_path / "n")


def test_another_ignored_value(tmp_path: Path) -> None:
    root = draw_masks(tmp_path / "own", values=(0, 1, 2, 9))
    with Image.open(root / "masks/test/0.png") as image:
        stored = np.asarray(image)
    assert np.array_equal(truth(root, tmp_path / "m", ignored=9), np.where(stored == 9, IGNORED, stored))


def test_names_of_cityscapes(root: Path, tmp_path: Path) -> None:
    """Folders of cities, endings of their own, and other files beside both."""
    for split in ("train", "test"):
        for i, path in enumerate(sorted((root / "pictures" / split).glob("*.png"))):
            city = f"city{i % 2}"
            for kind, ending in (("pictures", "_leftImg8bit.png"), ("masks", "_gtFine_labelTrainIds.png")):
                (root / kind / split / city).mkdir(exist_ok=True)
                (root / kind / split / path.name).rename(root / kind / split / city / f"{i:06}{ending}")
            Image.fromarray(picture(0)).save(root / "masks" / split / city / f"{i:06}_gtFine_color.png")
            (root / "pictures" / split / city / f"{i:06}_vehicle.png").write_bytes(b"no picture of the data set")
    settings = masks_settings(root, suffix="_gtFine_labelTrainIds.png", image_suffix="_leftImg8bit.png")
    found = prepare(settings, tmp_path / "m")
    assert [entry.path for entry in found.splits["test"]] == [
        "pictures/test/city0/000000_leftImg8bit.png",
        "pictures/test/city0/000002_leftImg8bit.png",
        "pictures/test/city1/000001_leftImg8bit.png",
    ]
    assert len(opened_again(settings, tmp_path / "m").batch("test", np.arange(3), None).truth) == 3


def test_names_of_classes_from_a_file(root: Path, tmp_path: Path) -> None:
    (root / "classes.txt").write_text("road\ncar\nsky\n\n")
    assert prepare(masks_settings(root, classes="classes.txt"), tmp_path / "m").classes == tuple(NAMES)
    for text, message in (
        ("road\n\nsky\n", "no name of class 1"),
        ("a\na\nb\n", "class name 'a' twice"),
        ("", "no name"),
    ):
        (root / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=rf"classes\.txt .*{message}"):
            prepare(masks_settings(root, classes="classes.txt"), tmp_path / "m")
    with pytest.raises(DataError, match=r"data\.classes: cannot read .*nowhere\.txt"):
        prepare(masks_settings(root, classes="nowhere.txt"), tmp_path / "m")


def test_hold_out_takes_masks_along(root: Path, tmp_path: Path) -> None:
    whole = opened(masks_settings(root), tmp_path / "whole")
    parts = opened(masks_settings(root, holdout=2), tmp_path / "parts")
    paths = [entry.path for entry in whole.manifest.splits["train"]]
    for split, count in (("train", 4), ("holdout", 2)):
        assert parts.count(split) == count
        for i, entry in enumerate(parts.manifest.splits[split]):
            own = parts.batch(split, np.array([i]), None)
            other = whole.batch("train", np.array([paths.index(entry.path)]), None)
            assert all(np.array_equal(a, b) for a, b in zip(own, other, strict=True))


def test_a_class_that_no_test_mask_has(root: Path, tmp_path: Path) -> None:
    for path in (root / "masks/test").glob("*.png"):
        save(path, np.zeros(size_of(path)[::-1]))
    assert set(np.unique(truth(root, tmp_path / "m"))) == {0}


def test_a_class_that_no_training_mask_has_is_told(tmp_path: Path) -> None:
    """Masks of 0 and 255, where 255 was meant to be a class and is ignored."""
    root = draw_masks(tmp_path / "own", values=(0, 255))
    with pytest.warns(UserWarning, match=r"no training mask has a pixel of 'thing'"):
        prepare(masks_settings(root, classes=["ground", "thing"]), tmp_path / "m")


def other_size(root: Path) -> None:
    save(root / "masks/train/2.png", np.zeros((5, 7)))


def all_ignored(root: Path) -> None:
    for path in (root / "masks/test").glob("*.png"):
        save(path, np.full(size_of(path)[::-1], 255))


def deep(root: Path) -> None:
    size = size_of(root / "masks/train/2.png")
    Image.fromarray(np.ones(size[::-1], np.uint16)).save(root / "masks/train/2.png")


def few_bits_of_grey(root: Path) -> None:
    """A PNG of 4 bits of grey: PIL gives its value 1 as 17."""
    import struct
    import zlib

    width, height = size_of(root / "masks/train/2.png")
    row = b"\0" + bytes([0x11]) * ((width + 1) // 2)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)), (b"IDAT", zlib.compress(row * height))]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (root / "masks/train/2.png").write_bytes(content)
    with Image.open(root / "masks/train/2.png") as image:
        assert np.asarray(image).max() == 17


def convert(mode: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "masks/train/2.png"
        with Image.open(path) as image:
            converted = image.convert(mode)
        converted.save(path)

    return change


def as_jpeg(root: Path) -> None:
    path = root / "masks/train/2.png"
    Image.fromarray(np.zeros(size_of(path)[::-1], np.uint8)).save(path, format="JPEG")


def twice(root: Path) -> None:
    Image.fromarray(picture(2)).save(root / "pictures/train/2.jpg")


def same_bytes(root: Path) -> None:
    for kind in ("pictures", "masks"):
        shutil.copy(root / kind / "train/1.png", root / kind / "test/zz.png")


def same_file(root: Path) -> None:
    (root / "pictures/test/zz.png").symlink_to(root / "pictures/train/1.png")
    shutil.copy(root / "masks/train/1.png", root / "masks/test/zz.png")


def one_folder(root: Path) -> None:
    shutil.rmtree(root / "pictures/test")
    (root / "pictures/test").symlink_to(root / "pictures/train")
    shutil.rmtree(root / "masks/test")
    (root / "masks/test").symlink_to(root / "masks/train")


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no mask": (lambda root: (root / "masks/train/2.png").unlink(), r"train/2\.png has no mask: .*masks/train/2\.png"),
    "no masks": (lambda root: shutil.rmtree(root / "masks/train"), r"train/0\.png has no mask: .*, and 1 more$"),
    "no pictures": (lambda root: shutil.rmtree(root / "pictures/test"), r"pictures/test is no folder"),
    "empty": (lambda root: [p.unlink() for p in (root / "pictures/test").iterdir()], r"pictures/test holds no picture"),
    "other size": (other_size, r"pictures/train/2\.png has \d+×\d+ pixels, but its mask .*train/2\.png 7×5"),
    "colours": (convert("RGB"), r"masks/train/2\.png is a picture of mode RGB; allowed: one 8-bit class index"),
    "alpha": (convert("LA"), r"masks/train/2\.png is a picture of mode LA"),
    "16 bits": (deep, r"masks/train/2\.png has 16 bits per pixel or more"),
    "4 bits of grey": (few_bits_of_grey, r"masks/train/2\.png has 4 bits per pixel of grey; allowed: 8, or a palette"),
    "JPEG": (as_jpeg, r"masks/train/2\.png is a JPEG, which changes values"),
    "no valid pixel": (all_ignored, r"own: none of the 3 masks of the test split has a valid pixel"),
    "duplicate": (twice, r"duplicate file names: .*2\.jpg and .*2\.png have the same mask .*masks/train/2\.png"),
    "no image": (write("masks/train/2.png", b"this is text"), r"masks/train/2\.png cannot be read as an image"),
    "no picture": (write("pictures/train/2.png", b"this is text"), r"pictures/train/2\.png cannot be read as an image"),
    "zero bytes": (write("pictures/train/2.png", b""), r"pictures/train/2\.png is empty"),
    "same bytes": (same_bytes, r"1 of 4 test pictures .*pictures/test/zz\.png is pictures/train/1\.png"),
    "same file": (same_file, r"picture 'pictures/test/zz\.png' of the test split is in the training split, too"),
    "same folder": (one_folder, r"pictures 'pictures/test/0\.png', .* 3 more of the test split are in the training"),
    "turned mask": (lambda root: turn(root / "masks/train/2.png", 3), r"masks/train/2\.png is turned by EXIF"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faulty_files_are_named(root: Path, tmp_path: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(root)
    with pytest.raises(DataError, match=message):
        prepare(masks_settings(root), tmp_path / "m")
    assert not (tmp_path / "m" / "manifest.json").exists()


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "same folder": ({"test": "pictures/train"}, r"data\.train and data\.test are both 'pictures/train'"),
    "ignored is a class": ({"ignored": 2}, r"data\.ignored is 2, but the 3 classes have the values 0 to 2$"),
    "ignored is 0": ({"ignored": 0}, r"data\.ignored is 0, .*set data\.zero_is_ignored instead"),
    "too many classes": ({"classes": [str(i) for i in range(256)]}, r"data\.ignored is 255, but the 256 classes"),
}


@pytest.mark.parametrize(("values", "message"), SETTINGS.values(), ids=SETTINGS)
def test_wrong_settings_are_named(root: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(masks_settings(root, **values), tmp_path / "m")


def test_a_few_shared_pictures_of_many_are_told(root: Path, tmp_path: Path) -> None:
    """As published benchmarks have them."""
    blank = np.zeros((2, 2), np.uint8)
    for i in range(150):
        Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(root / f"pictures/test/many{i}.png")
        Image.fromarray(blank).save(root / f"masks/test/many{i}.png")
    shutil.copy(root / "pictures/test/many7.png", root / "pictures/train/seven.png")
    Image.fromarray(blank).save(root / "masks/train/seven.png")
    with pytest.warns(UserWarning, match=r"1 of 153 test pictures .*many7\.png is pictures/train/seven\.png"):
        prepare(masks_settings(root), tmp_path / "m")


def test_value_that_appears_later_is_found(root: Path, tmp_path: Path) -> None:
    """Of a mask that was not hashed and has kept its size in bytes."""
    settings = masks_settings(root)
    path = root / "masks/test/0.png"
    shape = size_of(path)[::-1]
    Image.fromarray(np.zeros(shape, np.uint8)).save(path, compress_level=0)
    data = opened(settings, tmp_path / "m")
    size = path.stat().st_size
    Image.fromarray(np.full(shape, 77, np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == size
    with pytest.raises(DataError, match=r"masks/test/0\.png has the value 77 in .* pixels, which is no class"):
        data.batch("test", np.array([0]), None)


def test_turned_picture_goes_with_a_mask_of_what_it_shows(root: Path, tmp_path: Path) -> None:
    path, mask = root / "pictures/test/0.png", root / "masks/test/0.png"
    before = opened(masks_settings(root), tmp_path / "before").batch("test", np.array([0]), None)
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path)  # what a camera held on its side stores
    turn(path, 6)
    after = opened(masks_settings(root), tmp_path / "after").batch("test", np.array([0]), None)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with Image.open(mask) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(mask)
    with pytest.raises(DataError, match=r"test/0\.png is turned by EXIF, but its mask .* is for the picture before"):
        prepare(masks_settings(root), tmp_path / "m")


def test_masks_are_no_labels_and_no_boxes(root: Path, tmp_path: Path) -> None:
    settings = masks_settings(root)
    prepare(settings, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"data\.source is 'masks', which has no boxes; allowed: coco, scenes"):
        open_annotated(tmp_path / "m", settings, JointAugmentationSettings(), TRANSFORM, needs="boxes")
    with pytest.raises(ConfigError, match=r"data\.source is 'masks', whose images have masks or boxes, but no label"):
        open_data(tmp_path / "m", settings, None, {})  # type: ignore[arg-type]
