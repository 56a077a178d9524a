"""Images of a folder through what timm says of a model: colours, sizes, augmentation, files that cannot be read."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import TRANSFORM, draw_folder, everything, folder_settings, prepared, same
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from maskllm4v.data import ImageData, prepare
from maskllm4v.data.batches import plain_loader, step_loader
from maskllm4v.tasks.classification.models import image_settings
from maskllm4v.tasks.classification.settings import TimmSettings
from maskllm4v.utils.errors import ConfigError, DataError, UserError
from maskllm4v.utils.images import read_picture
from maskllm4v.utils.rng import generator

MODEL = TimmSettings(name="vit_tiny_patch16_224", args={"img_size": 32})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "pets")


def open_folder(root: Path, model: TimmSettings = MODEL, **task: Any) -> ImageData:
    return prepared(folder_settings(root), root.parent / "manifest", image_settings(model), **{"hflip": 0.5, **task})


def test_folder_images_go_through_the_models_transform(source: Path) -> None:
    data = open_folder(source)
    found = everything(data, "test")
    assert found.shape == (4, 3, 32, 32)
    assert found.dtype is torch.float32
    size = int(32 / TRANSFORM["crop_pct"])
    for entry, image in zip(data.manifest.splits["test"], found, strict=True):
        with Image.open(source / entry.path) as file:  # 36 wide, 40 high; shorter side to `size`, then the centre
            small = file.resize((size, int(size * 40 / 36)), Image.Resampling.BICUBIC)
        left, top = round((small.width - 32) / 2), round((small.height - 32) / 2)
        pixels = np.asarray(small.crop((left, top, left + 32, top + 32))) / 255
        expected = ((pixels - TRANSFORM["mean"]) / TRANSFORM["std"]).transpose(2, 0, 1)
        assert np.allclose(image.numpy(), expected, atol=1e-5)
    assert data.labels("test").tolist() == [0, 0, 1, 1]


def test_folder_augmentation_is_a_function_of_seed_and_step(source: Path) -> None:
    data, indices = open_folder(source), np.arange(11)

    def images(seed: int, step: int) -> Tensor:
        return data.images("train", indices, generator(seed, "augment", step))

    first = images(0, 0)
    assert first.shape == (11, 3, 32, 32)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert torch.equal(first, images(0, 0))
    others = [images(0, 1), images(1, 0), everything(data, "train")]
    assert not any(torch.equal(image, other) for whole in others for image, other in zip(first, whole, strict=True))


def test_images_of_a_batch_are_augmented_differently(source: Path) -> None:
    found = open_folder(source).images("train", np.array([3, 3]), generator(0, "augment", 0))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("broken", [False, True])
def test_folder_augmentation_leaves_the_global_generators_alone(source: Path, broken: bool) -> None:
    data = open_folder(source)
    if broken:
        (source / "train" / "cat" / "2.png").write_bytes(b"nothing of the kind")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        data.images("train", np.arange(11), generator(0, "augment", 0))
    except DataError:
        assert broken
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_folder_batches_with_workers(source: Path) -> None:
    data = open_folder(source)
    runs = [list(step_loader(data, seed=1, batch_size=4, steps=4, workers=n)) for n in (0, 2)]
    assert same(*runs)
    assert same(runs[0][2:], list(step_loader(data, seed=1, batch_size=4, steps=4, start=2)))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "a.png"),
        ("RGBA", "a.png"),
        ("CMYK", "a.jpg"),
        ("P", "a.png"),
        ("1", "a.bmp"),
        ("LA", "a.png"),
        ("RGB", "a.JPEG"),
    ],
)
def test_every_colour_mode_loads_as_three_channels(source: Path, mode: str, name: str) -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(40, 40), dtype=np.uint8))
    grey.convert("RGB").convert(mode).save(source / "val" / "cat" / name)
    data = open_folder(source)
    position = [e.path for e in data.manifest.splits["test"]].index(f"val/cat/{name}")
    with Image.open(source / "val" / "cat" / name) as file:
        assert file.mode == mode
    plain = data.images("test", np.array([position]), None)
    assert plain.shape == (1, 3, 32, 32)
    assert torch.isfinite(plain).all()
    assert plain.std() > 0.1
    assert data.images("test", np.array([position]), generator(0, "x")).shape == (1, 3, 32, 32)


def test_one_channel_models_get_one_channel(source: Path) -> None:
    grey = image_settings(TimmSettings(name="VisionTransformer", args={"img_size": 16, "in_chans": 1}))
    grey = {**grey, "mean": (0.5,), "std": (0.5,)}
    data = prepared(folder_settings(source), source.parent / "m", grey)
    assert data.images("test", np.arange(2), None).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(source: Path, orientation: int) -> None:
    """By NumPy: what the stored pixels show for each of EXIF's eight orientations."""
    stored = np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    flips = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    turned = {5: stored, 6: stored[::-1], 7: stored[::-1, ::-1], 8: stored[:, ::-1]}
    shown = flips.get(orientation)
    if shown is None:
        shown = turned[orientation].transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(source / "val/cat/0.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(shown)).save(source / "val/cat/1.png")
    data = open_folder(source)
    found = data.images("test", np.arange(2), None)
    assert torch.equal(found[0], found[1])
    augmented = [data.images("test", np.array([i]), generator(0, "x")) for i in (0, 1)]
    assert torch.equal(*augmented)


UNREADABLE = {
    "no image": lambda content: b"this is text",
    "cut off": lambda content: content[: len(content) // 2],
    "damaged": lambda content: content[:60] + bytes(len(content) - 60),
    "header only": lambda content: content[:8],
    "missing": None,
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("augmented", [False, True])
def test_unreadable_image_is_named(source: Path, damage: Callable[[bytes], bytes] | None, augmented: bool) -> None:
    data, path = open_folder(source), source / "train" / "cat" / "3.png"
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(DataError, match=r"train/cat/3\.png cannot be read"):
        data.images("train", np.arange(11), generator(0, "x") if augmented else None)


def test_deep_images_are_refused(source: Path) -> None:
    Image.fromarray(np.full((40, 40), 1000, dtype=np.uint16)).save(source / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match=r"train/cat/0\.png has more than 8 bits a channel"):
        open_folder(source).images("train", np.arange(11), None)


def test_shift_of_decoded_images_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.shift is for images that are kept in memory"):
        open_folder(source, shift=1)


@pytest.mark.parametrize("policy", ["nonsense", "rand-x9"])
def test_unknown_augmentation_is_a_config_error(source: Path, policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"task\.auto_augment is '{policy}'"):
        open_folder(source, auto_augment=policy)


@pytest.mark.parametrize("part", [slice(0, 3), slice(4, 11)])
def test_augmentation_of_a_part_is_that_of_the_whole(source: Path, part: slice) -> None:
    data, indices = open_folder(source, auto_augment="rand-m8"), np.arange(11)[::-1].copy()
    whole = data.images("train", indices, generator(0, "x"))
    assert torch.equal(data.images("train", indices, generator(0, "x"), part), whole[part])


def test_resized_images_are_those_of_a_smaller_model(source: Path) -> None:
    small = open_folder(source, TimmSettings(name="vit_tiny_patch16_224", args={"img_size": 16}))
    found = open_folder(source).resized(16)
    assert torch.equal(everything(found, "train"), everything(small, "train"))
    indices = np.arange(11)
    augmented = [data.images("train", indices, generator(0, "x")) for data in (found, small)]
    assert torch.equal(*augmented)


def test_augmentation_is_the_tasks(source: Path) -> None:
    plain = {"hflip": 0.0, "color_jitter": 0.0, "crop_scale": [1.0, 1.0], "crop_ratio": [0.9, 0.9]}

    def images(**task: Any) -> Tensor:
        return open_folder(source, **{**plain, **task}).images("train", np.arange(11), generator(0, "x"))

    whole = images()
    assert torch.equal(images(hflip=1.0), whole.flip(-1))
    for task in (
        {"color_jitter": 0.4},
        {"crop_scale": [0.1, 0.2]},
        {"random_erasing": 1.0},
        {"auto_augment": "rand-m9"},
    ):
        assert not torch.equal(images(**task), whole), task
    erased = images(random_erasing=1.0)
    assert all((image == 0).all(0).any() for image in erased)  # "const" is the mean


# Palettes, and sizes


def test_palette_with_transparency_becomes_rgb(source: Path) -> None:
    palette = Image.new("P", (24, 24))
    palette.putdata([number % 2 for number in range(576)])
    palette.putpalette([10, 20, 30, 200, 150, 100])
    palette.save(source / "train" / "cat" / "0.png", transparency=bytes([0, 128]))
    with Image.open(source / "train" / "cat" / "0.png") as image:
        assert (image.mode, image.info["transparency"]) == ("P", bytes([0, 128]))
    data = open_folder(source, TimmSettings(name="vit_tiny_patch16_224", args={"img_size": 32}))
    assert data.manifest.splits["train"][0].path == "train/cat/0.png"
    found = data.images("train", np.array([0]), None)[0].mean((1, 2)) * 0.5 + 0.5
    assert np.allclose(found.numpy() * 255, [105, 85, 65], atol=2)  # the colours' mean: transparency is ignored


@pytest.mark.parametrize(
    ("args", "shape"),
    [
        ({"img_size": 32}, (3, 32, 32)),
        ({"img_size": [32, 64]}, (3, 32, 64)),
        ({"img_size": 32, "in_chans": 1}, (1, 32, 32)),
        ({"in_chans": 1}, (1, 224, 224)),
    ],
)
def test_images_have_the_shape_that_the_model_takes(args: dict[str, Any], shape: tuple[int, ...], source: Path) -> None:
    data = open_folder(source, TimmSettings(name="vit_tiny_patch16_224", args=args))
    assert data.images("train", np.arange(2), None).shape == (2, *shape)
    assert data.images("train", np.arange(2), np.random.default_rng(0)).shape == (2, *shape)


# Pictures that nobody expects


def too_large(path: Path) -> None:
    Image.new("1", (20_000, 9_500)).save(path)


def long_text(path: Path) -> None:
    info = PngInfo()
    info.add_text("note", "x" * 2**21, zip=True)
    Image.new("RGB", (40, 40)).save(path, pnginfo=info)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


ODD = {"too large": too_large, "long text": long_text, "truncated": truncate}


@pytest.mark.parametrize("spoil", ODD.values(), ids=ODD)
@pytest.mark.parametrize("workers", [0, 1])
def test_odd_picture_is_named_in_a_line(source: Path, spoil: Callable[[Path], None], workers: int) -> None:
    path = source / "train" / "cat" / "3.png"
    spoil(path)
    data = open_folder(source)
    loads = (
        lambda: list(step_loader(data, seed=1, batch_size=11, steps=1, workers=workers)),
        lambda: list(plain_loader(data, "train", np.arange(11), 4, workers)),
    )
    for load in loads:
        with pytest.raises(DataError) as caught:
            load()
        assert str(caught.value).startswith(f"{path} cannot be read as an image: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", ODD.values(), ids=ODD)
def test_odd_picture_is_named_while_hashing(source: Path, spoil: Callable[[Path], None]) -> None:
    path = source / "train" / "cat" / "3.png"
    spoil(path)
    with pytest.raises(DataError) as caught:
        prepare(folder_settings(source, hash_files=True), source.parent / "m")
    assert str(caught.value).startswith(f"{path} cannot be read as an image: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", ODD.values(), ids=ODD)
def test_odd_picture_of_our_own_is_named(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    spoil(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"^cannot read .*/a\.png: \S"):
        read_picture(tmp_path / "a.png")
