"""Data sources, their manifests and their batches."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from maskllm4v.config import DataSettings, ModelSettings
from maskllm4v.data import ImageData, Manifest, open_data, prepare, read_manifest
from maskllm4v.data.batches import StepBatches, step_loader
from maskllm4v.errors import DataError
from maskllm4v.models import image_settings
from maskllm4v.randomness import generator

TRANSFORM = image_settings(ModelSettings(name="vit_tiny_patch16_224", args={"img_size": 32}))


def digits_settings(**values: Any) -> DataSettings:
    return DataSettings(**{"name": "digits", "source": "digits", **values})


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare(digits_settings(), folder)
    return folder


@pytest.fixture
def manifest(digits_folder: Path) -> Manifest:
    return read_manifest(digits_folder)


@pytest.fixture
def digits(digits_folder: Path) -> ImageData:
    return open_data(digits_folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An image folder: 2 classes, 5 and 6 training images, 2 test images each, all different."""
    root, draw = tmp_path / "pets", np.random.default_rng(0)
    for split, counts in {"train": (5, 6), "val": (2, 2)}.items():
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def folder_settings(root: Path, **values: Any) -> DataSettings:
    return DataSettings(**{"name": "pets", "source": "folder", "root": str(root), "calibration": 4, **values})


def open_folder(root: Path, **values: Any) -> ImageData:
    prepare(folder_settings(root, **values), root.parent / "manifest")
    return open_data(root.parent / "manifest", transform=TRANSFORM)


def everything(data: ImageData, split: str) -> Tensor:
    return data.images(split, np.arange(len(data.manifest.splits[split])), None)


# Digits


def test_split_is_disjoint_complete_and_stratified(manifest: Manifest) -> None:
    train, test = ({int(e.path) for e in manifest.splits[split]} for split in ("train", "test"))
    assert (len(manifest.splits["train"]), len(manifest.splits["test"])) == (898, 899)
    assert (len(train), len(test)) == (898, 899)
    assert train | test == set(range(1797))
    counts = [Counter(manifest.labels(split).tolist()) for split in ("train", "test")]
    assert set(counts[0]) == set(range(10))
    assert all(abs(counts[0][digit] - counts[1][digit]) <= 1 for digit in range(10))
    assert manifest.classes == tuple("0123456789")


def test_calibration_is_unique_and_in_the_training_split(manifest: Manifest) -> None:
    chosen = manifest.calibration.tolist()
    assert len(chosen) == len(set(chosen)) == 128
    assert min(chosen) >= 0
    assert max(chosen) < 898
    assert max(chosen) > 700  # drawn, not the first ones


def test_same_settings_same_digest(tmp_path: Path, manifest: Manifest) -> None:
    assert prepare(digits_settings(), tmp_path / "again").digest == manifest.digest


@pytest.mark.parametrize("values", [{"split_seed": 1}, {"calibration_seed": 1}, {"calibration": 127}])
def test_other_settings_other_digest(tmp_path: Path, manifest: Manifest, values: dict[str, Any]) -> None:
    other = prepare(digits_settings(**values), tmp_path)
    assert other.digest != manifest.digest
    assert (other.splits == manifest.splits) == ("split_seed" not in values)


def test_calibration_seed_gives_another_subset(tmp_path: Path, manifest: Manifest) -> None:
    assert prepare(digits_settings(calibration_seed=1), tmp_path).calibration.tolist() != manifest.calibration.tolist()


def test_images_are_those_of_sklearn_normalised(digits: ImageData) -> None:
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8) / 16
    train = pixels[[int(e.path) for e in digits.manifest.splits["train"]]]
    for split in ("train", "test"):
        chosen = [int(e.path) for e in digits.manifest.splits[split]]
        expected = (pixels[chosen] - train.mean()) / train.std()
        found = everything(digits, split)
        assert found.shape == (len(chosen), 1, 8, 8)
        assert found.dtype is torch.float32
        assert np.allclose(found[:, 0].numpy(), expected, atol=1e-4)
        assert digits.labels(split).dtype is torch.int64
        assert digits.labels(split).tolist() == labels[chosen].tolist()


def test_training_images_are_standardised(digits: ImageData) -> None:
    images = everything(digits, "train").double()
    assert float(images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_indices_select_and_order(digits: ImageData) -> None:
    assert torch.equal(digits.images("test", np.array([7, 2, 7]), None), everything(digits, "test")[[7, 2, 7]])


# Shifts


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
    data = open_data(digits_folder, shift=shift, shift_probability=probability)
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
    data = open_data(digits_folder, shift=1)
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
    data = open_data(digits_folder, **options)
    found = data.images("train", np.arange(898), generator(0, "augment", 0))
    assert torch.equal(found, everything(digits, "train"))


def test_augmentation_leaves_the_images_alone(digits_folder: Path, digits: ImageData) -> None:
    data = open_data(digits_folder, shift=2)
    data.images("train", np.arange(898), generator(0, "augment", 0)).fill_(7.0)
    data.images("train", np.arange(898), None).fill_(7.0)
    assert torch.equal(everything(data, "train"), everything(digits, "train"))


# Damaged manifests


def edit_csv(folder: Path) -> None:
    path = folder / "train.csv"
    path.write_text(path.read_text().replace(",3,", ",4,", 1))


def edit_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        about = json.loads(path.read_text())
        change(about)
        path.write_text(json.dumps(about))

    return edit


DAMAGE = {
    "csv edited": edit_csv,
    "csv missing": lambda folder: (folder / "test.csv").unlink(),
    "json broken": lambda folder: (folder / "manifest.json").write_text('{"name": '),
    "json no mapping": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "json no text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "json missing": lambda folder: (folder / "manifest.json").unlink(),
    "key missing": edit_json(lambda about: about.pop("calibration")),
    "splits no mapping": edit_json(lambda about: about.update(splits=["train", "test"])),
    "facts no mapping": edit_json(lambda about: about.update(splits={"train": None})),
    "unknown source": edit_json(lambda about: about.update(source="tape")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_manifest_raises(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    prepare(digits_settings(), tmp_path)
    open_data(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=tmp_path.name):
        open_data(tmp_path)


def test_other_images_than_the_manifests_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskllm4v.data import digits as module

    prepare(digits_settings(), tmp_path)
    images, labels = module._load()
    images[17, 3, 3] += 1 / 16
    monkeypatch.setattr(module, "_load", lambda: (images, labels))
    with pytest.raises(DataError, match="image 17 "):
        open_data(tmp_path)


@pytest.mark.parametrize("count", [899, 5000])
def test_more_calibration_than_training_images_raises(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=rf"{count}, .* 898 images"):
        prepare(digits_settings(calibration=count), tmp_path)


def test_all_training_images_may_calibrate(tmp_path: Path) -> None:
    assert prepare(digits_settings(calibration=898), tmp_path).calibration.tolist() == list(range(898))


# Batches


class Numbers:
    """Image i holds i, plus noise in [0, ½) if augmented."""

    def __init__(self, count: int) -> None:
        self.count = count

    def labels(self, split: str) -> Tensor:
        assert split == "train"
        return torch.arange(self.count) * 10

    def images(self, split: str, indices: np.ndarray, augment: np.random.Generator | None) -> Tensor:
        assert split == "train"
        assert augment is not None
        return torch.from_numpy(indices + augment.random(len(indices)) / 2).reshape(-1, 1, 1, 1)


def batches(count: int = 23, size: int = 5, seed: int = 0) -> StepBatches:
    return StepBatches(Numbers(count), seed=seed, batch_size=size)  # type: ignore[arg-type]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_batch_is_a_pure_function_of_the_step() -> None:
    first, other = batches(), batches()
    forwards = [first[step] for step in range(12)]
    backwards = [other[step] for step in reversed(range(12))][::-1]
    assert same(forwards, backwards)
    assert same(forwards, [first[step] for step in range(12)])


def test_seed_changes_order_and_augmentation() -> None:
    (a, la), (b, lb) = batches(seed=0)[0], batches(seed=1)[0]
    assert not torch.equal(la, lb)
    assert not torch.equal(a - a.floor(), b - b.floor())


@pytest.mark.parametrize(("count", "size"), [(23, 5), (20, 5), (5, 5), (7, 1)])
def test_no_image_twice_in_an_epoch(count: int, size: int) -> None:
    found = batches(count, size)
    assert found.steps_per_epoch == count // size
    epochs = []
    for epoch in range(4):
        items = [found[epoch * found.steps_per_epoch + i] for i in range(found.steps_per_epoch)]
        labels = torch.cat([labels for _, labels in items])
        seen = torch.cat([images for images, _ in items]).floor().long().flatten()
        assert torch.equal(seen * 10, labels)
        assert len(set(seen.tolist())) == len(seen) == count // size * size
        epochs.append(tuple(seen.tolist()))
    assert len(set(epochs)) > 1


def test_augmentation_is_new_each_epoch() -> None:
    found, seen = batches(4, 4), []
    for step in range(3):
        images = found[step][0].flatten()
        seen.append(images.sort().values.tolist())
    assert len({value for values in seen for value in values}) == 12


def test_loader_gives_the_steps_asked_for() -> None:
    data, found = Numbers(23), batches(seed=2)
    got = list(step_loader(data, seed=2, batch_size=5, steps=9))  # type: ignore[arg-type]
    assert same(got, [found[step] for step in range(9)])


@pytest.mark.parametrize("start", [0, 3, 4, 8, 9])
def test_resumed_run_is_the_tail_of_an_uninterrupted_one(digits_folder: Path, start: int) -> None:
    data = open_data(digits_folder, shift=1, shift_probability=0.5)
    whole = list(step_loader(data, seed=2, batch_size=224, steps=9))
    assert same(list(step_loader(data, seed=2, batch_size=224, steps=9, start=start)), whole[start:])


def test_workers_change_no_bit(digits_folder: Path) -> None:
    data = open_data(digits_folder, shift=1, shift_probability=0.5)
    runs = [list(step_loader(data, seed=1, batch_size=300, steps=5, start=1, workers=n)) for n in (0, 2)]
    assert len(runs[0]) == 4
    assert same(*runs)


@pytest.mark.parametrize("size", [899, 10_000])
def test_batch_larger_than_the_split_raises(digits: ImageData, size: int) -> None:
    with pytest.raises(DataError, match=rf"batch_size is {size}, .* 898 images"):
        next(step_loader(digits, seed=0, batch_size=size, steps=1))


# Image folders


@pytest.mark.parametrize("hashed", [False, True])
def test_folder_manifest(source: Path, tmp_path: Path, hashed: bool) -> None:
    (source / "train" / "cat" / "notes.txt").write_text("no image")
    found = prepare(folder_settings(source, hash_files=hashed), tmp_path / "m")
    assert found.classes == ("cat", "dog")
    train = [f"train/cat/{i}.png" for i in range(5)] + [f"train/dog/{i}.png" for i in range(6)]
    assert [e.path for e in found.splits["train"]] == train
    assert [e.path for e in found.splits["test"]] == [f"val/{name}/{i}.png" for name in ("cat", "dog") for i in (0, 1)]
    assert found.labels("train").tolist() == [0] * 5 + [1] * 6
    assert all(e.bytes == (source / e.path).stat().st_size for e in found.splits["train"])
    assert {len(e.sha256) for e in found.splits["train"]} == {64 if hashed else 0}
    assert len(set(found.calibration.tolist())) == 4
    assert set(found.calibration.tolist()) <= set(range(11))
    assert prepare(folder_settings(source, hash_files=hashed), tmp_path / "again").digest == found.digest


@pytest.mark.parametrize("hashed", [False, True])
def test_changed_image_changes_the_digest(source: Path, tmp_path: Path, hashed: bool) -> None:
    before = prepare(folder_settings(source, hash_files=hashed), tmp_path / "a").digest
    path = source / "train" / "dog" / "3.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if hashed else content + b"x")
    assert prepare(folder_settings(source, hash_files=hashed), tmp_path / "b").digest != before


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
    prepare(folder_settings(source), source.parent / "m")
    grey = image_settings(ModelSettings(name="VisionTransformer", args={"img_size": 16, "in_chans": 1}))
    grey = {**grey, "mean": (0.5,), "std": (0.5,)}
    assert open_data(source.parent / "m", transform=grey).images("test", np.arange(2), None).shape == (2, 1, 16, 16)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        empty(path)
        path.rmdir()
    folder.rmdir()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty class": (lambda root: empty(root / "train" / "dog"), r"train/dog holds no image"),
    "empty class in test": (lambda root: empty(root / "val" / "cat"), r"val/cat holds no image"),
    "zero bytes": (lambda root: (root / "train" / "cat" / "3.png").write_bytes(b""), r"cat/3\.png is empty"),
    "missing split": (lambda root: remove(root / "val"), r"val is no folder"),
    "no classes": (lambda root: (remove(root / "train"), (root / "train").mkdir()), r"train has no class folders"),
    "one class more": (lambda root: (root / "val" / "emu").mkdir(), r"classes: emu$"),
    "other class": (lambda root: (root / "val" / "cat").rename(root / "val" / "cow"), r"classes: cat, cow$"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faulty_folder_raises(source: Path, tmp_path: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(source)
    with pytest.raises(DataError, match=message):
        prepare(folder_settings(source), tmp_path / "m")
    assert not (tmp_path / "m" / "manifest.json").exists()


def test_missing_root_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        prepare(folder_settings(tmp_path / "nowhere"), tmp_path / "m")


def test_calibration_larger_than_the_folder_raises(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12, .* 11 images"):
        prepare(folder_settings(source, calibration=12), tmp_path / "m")


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
