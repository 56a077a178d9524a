"""The digits, and what a manifest says of any source: splits, calibration, damage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import digits_settings, draw_folder, everything, folder_settings, open_digits
from sklearn.datasets import load_digits

from maskllm4v.config import AugmentationSettings
from maskllm4v.data import ImageData, Manifest, open_data, prepare, read_manifest
from maskllm4v.data.manifest import Entry, hold_out
from maskllm4v.utils.errors import DataError


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
    return open_digits(digits_folder)


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
    (drawn,) = manifest.calibration
    chosen = drawn.tolist()
    assert manifest.calibration_split == "train"
    assert len(chosen) == len(set(chosen)) == 128
    assert min(chosen) >= 0
    assert max(chosen) < 898
    assert max(chosen) > 700  # drawn, not the first ones


def test_same_settings_same_digest(tmp_path: Path, manifest: Manifest) -> None:
    assert prepare(digits_settings(), tmp_path / "again").digest == manifest.digest


SETTINGS = [
    {"split_seed": 1},
    {"calibration_seed": 1},
    {"calibration": 127},
    {"calibration_sets": 2},
    {"calibration_split": "test"},
    {"holdout": 10},
]


@pytest.mark.parametrize("values", SETTINGS)
def test_other_settings_other_digest(tmp_path: Path, manifest: Manifest, values: dict[str, Any]) -> None:
    other = prepare(digits_settings(**values), tmp_path)
    assert other.digest != manifest.digest
    assert (other.splits == manifest.splits) == (not {"split_seed", "holdout"} & set(values))


def test_calibration_seed_gives_another_subset(tmp_path: Path, manifest: Manifest) -> None:
    other = prepare(digits_settings(calibration_seed=1), tmp_path)
    assert other.calibration[0].tolist() != manifest.calibration[0].tolist()


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
    "no sets": edit_json(lambda about: about.update(calibration=5)),
    "unknown source": edit_json(lambda about: about.update(source="tape")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_manifest_raises(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    prepare(digits_settings(), tmp_path)
    open_digits(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=tmp_path.name):
        open_digits(tmp_path)


def test_other_images_than_the_manifests_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskllm4v.data import digits as module

    prepare(digits_settings(), tmp_path)
    images, labels = module._load()
    images[17, 3, 3] += 1 / 16
    monkeypatch.setattr(module, "_load", lambda: (images, labels))
    with pytest.raises(DataError, match="image 17 "):
        open_digits(tmp_path)


@pytest.mark.parametrize("count", [899, 5000])
def test_more_calibration_than_training_images_raises(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=rf"{count}, .* 898 images"):
        prepare(digits_settings(calibration=count), tmp_path)


def test_all_training_images_may_calibrate(tmp_path: Path) -> None:
    assert prepare(digits_settings(calibration=898), tmp_path).calibration[0].tolist() == list(range(898))


def test_manifest_of_another_source_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    settings = folder_settings(tmp_path)
    with pytest.raises(DataError, match=r"manifest of source 'digits', not 'folder'; run prepare again"):
        open_data(digits_folder, settings, AugmentationSettings(), {})


@pytest.mark.parametrize("classes", [9, 11])
def test_other_number_of_classes_than_expected_raises(classes: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data.classes is {classes}, .* has 10 classes"):
        prepare(digits_settings(classes=classes), tmp_path)
    with pytest.raises(DataError, match=f"data.classes is {classes}, .* has 2 classes"):
        prepare(folder_settings(draw_folder(tmp_path / "pets"), classes=classes), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_expected_number_of_classes_passes(tmp_path: Path, manifest: Manifest) -> None:
    assert prepare(digits_settings(classes=10), tmp_path).digest == manifest.digest


# Held-out images


def test_held_out_images_are_the_training_splits_own(tmp_path: Path, manifest: Manifest) -> None:
    found = prepare(digits_settings(holdout=100), tmp_path / "a")
    train, held = found.splits["train"], found.splits["holdout"]
    assert (len(train), len(held)) == (798, 100)
    assert not set(train) & set(held)
    order = {entry: place for place, entry in enumerate(manifest.splits["train"])}
    assert sorted([*train, *held], key=order.__getitem__) == manifest.splits["train"]
    assert all(list(part) == sorted(part, key=order.__getitem__) for part in (train, held))
    assert order[held[-1]] > 700  # drawn, not the first ones
    assert found.splits["test"] == manifest.splits["test"]
    assert max(found.calibration[0]) < 798
    assert prepare(digits_settings(holdout=100), tmp_path / "b").digest == found.digest


def test_held_out_images_open_as_a_split(tmp_path: Path, digits: ImageData) -> None:
    prepare(digits_settings(holdout=100), tmp_path)
    data = open_data(tmp_path, digits_settings(holdout=100), AugmentationSettings(), {})
    paths = [entry.path for entry in digits.manifest.splits["train"]]
    places = np.array([paths.index(entry.path) for entry in data.manifest.splits["holdout"]])
    assert torch.equal(everything(data, "holdout"), digits.images("train", places, None))
    assert torch.equal(data.labels("holdout"), digits.labels("train")[places])


def test_split_seed_draws_what_is_held_out() -> None:
    splits = {"train": [Entry(str(i), 0, 1, "") for i in range(50)], "test": []}
    held = [hold_out(splits, digits_settings(holdout=10, split_seed=seed))["holdout"] for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    assert hold_out(splits, digits_settings()) == splits


@pytest.mark.parametrize("count", [898, 5000])
def test_some_training_images_have_to_stay(count: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data.holdout is {count}, but the training split has 898 images"):
        prepare(digits_settings(holdout=count), tmp_path)


# Calibration sets


def test_calibration_sets_are_disjoint(tmp_path: Path) -> None:
    found = prepare(digits_settings(calibration=200, calibration_sets=4), tmp_path / "a").calibration
    assert [len(indices) for indices in found] == [200] * 4
    assert len(set(np.concatenate(found).tolist())) == 800
    assert all(indices.tolist() == sorted(indices.tolist()) for indices in found)
    first = prepare(digits_settings(calibration=200), tmp_path / "b").calibration
    assert first[0].tolist() == found[0].tolist()


def test_more_calibration_sets_than_images_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="200 times calibration_sets 5, but the train split has 898 images"):
        prepare(digits_settings(calibration=200, calibration_sets=5), tmp_path)
    with pytest.raises(DataError, match="898, but the train split has 798 images"):
        prepare(digits_settings(calibration=898, holdout=100), tmp_path)


def test_calibration_may_leak_from_the_test_split(tmp_path: Path) -> None:
    found = prepare(digits_settings(calibration=899, calibration_split="test"), tmp_path)
    assert found.calibration_split == "test"
    assert found.calibration[0].tolist() == list(range(899))  # the training split has one image less
    with pytest.raises(DataError, match="900, but the test split has 899 images"):
        prepare(digits_settings(calibration=900, calibration_split="test"), tmp_path)
