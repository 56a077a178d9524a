"""Data sets that timm indexes: folders, tar files, torchvision's."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from images import draw_folder, everything, folder_settings, prepared, same
from PIL import Image

from maskllm4v.config import AugmentationSettings, DataSettings
from maskllm4v.data import open_data, prepare
from maskllm4v.data.batches import step_loader
from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.rng import generator

KINDS = ["", "torch/image_folder", "tar"]


def timm_settings(root: Path, dataset: str = "", **values: Any) -> DataSettings:
    return folder_settings(root, source="timm", dataset=dataset, **values)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "pets")


@pytest.fixture(autouse=True)
def closed_tars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """timm leaves the tar files that it reads from open."""
    opened, plain = [], tarfile.open

    def noted(*args: Any, **how: Any) -> tarfile.TarFile:
        opened.append(plain(*args, **how))
        return opened[-1]

    monkeypatch.setattr(tarfile, "open", noted)
    yield
    for tar in opened:
        tar.close()


def of_kind(kind: str, source: Path, **values: Any) -> DataSettings:
    """The same images as a folder of timm's, of torchvision's, or as a tar file a split."""
    if kind != "tar":
        return timm_settings(source, kind, **values)
    for split in ("train", "val"):
        with tarfile.open(source / f"{split}.tar", "w") as tar:
            for path in (source / split).glob("*/*"):
                tar.add(path, path.relative_to(source / split))
    return timm_settings(source, **{"train": "train.tar", "test": "val.tar", **values})


# Folders and tar files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_memory", [None, 32])
def test_images_are_those_of_our_own_folders(kind: str, in_memory: int | None, source: Path, tmp_path: Path) -> None:
    wanted = prepared(folder_settings(source, in_memory=in_memory), tmp_path / "a", hflip=0.5)
    found = prepared(of_kind(kind, source, in_memory=in_memory), tmp_path / "b", hflip=0.5)
    assert found.manifest.classes == wanted.manifest.classes == ("cat", "dog")
    assert [entry.path for entry in found.manifest.splits["test"]] == [f"test/{i}" for i in range(4)]
    assert [indices.tolist() for indices in found.manifest.calibration] == [
        indices.tolist() for indices in wanted.manifest.calibration
    ]
    for split in ("train", "test"):
        assert torch.equal(found.labels(split), wanted.labels(split))
        assert torch.equal(everything(found, split), everything(wanted, split))
    augmented = [data.images("train", np.arange(11), generator(0, "x")) for data in (found, wanted)]
    assert torch.equal(*augmented)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_no_bit(kind: str, source: Path, tmp_path: Path) -> None:
    data = prepared(of_kind(kind, source, holdout=3), tmp_path / "m", hflip=0.5)
    assert len(data.manifest.splits["holdout"]) == 3
    assert everything(data, "holdout").shape == (3, 3, 32, 32)
    runs = [list(step_loader(data, seed=1, batch_size=4, steps=4, workers=n)) for n in (0, 2)]
    assert same(*runs)


def test_a_fork_reads_tar_files_of_its_own(source: Path, tmp_path: Path) -> None:
    """It would share the place in the file with its parent, and each would read what the other looked for."""
    data = prepared(of_kind("tar", source), tmp_path / "m")
    wanted = everything(data, "train")  # opens the file here

    def places() -> dict[str, int]:
        files = {path.name: os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}
        return {fd: os.lseek(int(fd), 0, os.SEEK_CUR) for fd, file in files.items() if file.endswith(".tar")}

    before = places()
    assert before
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            status = int(not torch.equal(data.images("train", np.arange(1), None), wanted[:1]))
        os._exit(status)
    assert os.waitpid(child, 0) == (child, 0)
    assert places() == before


def test_hashes_are_of_pixels_and_asked_for(source: Path, tmp_path: Path) -> None:
    manifests = [prepare(of_kind(kind, source, hash_files=True), tmp_path / f"m{i}") for i, kind in enumerate(KINDS)]
    first, *others = [[entry.sha256 for entry in manifest.splits["train"]] for manifest in manifests]
    assert len(set(first)) == 11
    assert {len(digest) for digest in first} == {64}
    assert others == [first, first]
    plain = prepare(of_kind("", source), tmp_path / "plain")
    assert {entry.sha256 for entry in plain.splits["train"]} == {""}


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("augmented", [False, True])
def test_unreadable_image_is_named_and_not_passed_over(
    kind: str, augmented: bool, source: Path, tmp_path: Path
) -> None:
    spoil(source / "train" / "dog" / "2.png")
    data = prepared(of_kind(kind, source), tmp_path / "m")
    name = rf"{kind if '/' in kind else source}, image train/7 \(.*dog/2\.png\) cannot be read as an image"
    with pytest.raises(DataError, match=name):
        data.images("train", np.arange(11), generator(0, "x") if augmented else None)
    with pytest.raises(DataError, match=name):
        prepare(of_kind(kind, source, hash_files=True), tmp_path / "hashed")


@pytest.mark.parametrize("kind", KINDS)
def test_other_number_of_images_than_the_manifests_raises(kind: str, source: Path, tmp_path: Path) -> None:
    settings = of_kind(kind, source, holdout=3)
    prepare(settings, tmp_path / "m")
    (source / "train" / "cat" / "4.png").unlink()
    of_kind(kind, source)
    with pytest.raises(DataError, match="train has 10 images, the manifest 11; run prepare again"):
        open_data(tmp_path / "m", settings, AugmentationSettings(), {})


@pytest.mark.parametrize("kind", KINDS)
def test_source_that_is_gone_is_named(kind: str, source: Path, tmp_path: Path) -> None:
    settings = of_kind(kind, source)
    prepare(settings, tmp_path / "m")
    shutil.rmtree(source)
    for step in (
        lambda: open_data(tmp_path / "m", settings, AugmentationSettings(), {}),
        lambda: prepare(settings, tmp_path),
    ):
        with pytest.raises(DataError, match=rf"data\.dataset '.*': {source}/train.* is missing"):
            step()


@pytest.mark.parametrize("kind", KINDS)
def test_missing_split_is_not_the_whole_root(kind: str, source: Path, tmp_path: Path) -> None:
    """timm takes all images below the root for a split whose folder it does not find."""
    settings = of_kind(kind, source, test="test")
    with pytest.raises(DataError, match=r"pets/test is missing"):
        prepare(settings, tmp_path / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_splits_of_different_classes_raise(kind: str, source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "val" / "cat")  # dogs would be class 0
    with pytest.raises(DataError, match=r"have different classes"):
        prepare(of_kind(kind, source), tmp_path / "m")


@pytest.mark.parametrize("kind", ["", "torch/image_folder"])
def test_split_without_images_raises(kind: str, source: Path, tmp_path: Path) -> None:
    for path in (source / "val").glob("*/*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"split 'val'"):
        prepare(of_kind(kind, source), tmp_path / "m")


def test_other_number_of_classes_than_expected_raises(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.classes is 3, but pets has 2 classes"):
        prepare(timm_settings(source, classes=3), tmp_path / "m")


# torchvision's


def idx(path: Path, array: np.ndarray, code: int) -> None:
    """A file as MNIST has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


def draw_mnist(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw, splits = np.random.default_rng(0), {}
    for split, prefix, count in (("train", "train", 12), ("test", "t10k", 5)):
        images = draw.integers(0, 256, size=(count, 28, 28), dtype=np.uint8)
        labels = draw.integers(0, 10, size=count, dtype=np.uint8)
        idx(root / "FashionMNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images, 8)
        idx(root / "FashionMNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", labels, 8)
        splits[split] = images, labels
    return splits


def test_torchvisions_images_and_classes(tmp_path: Path) -> None:
    splits = draw_mnist(tmp_path)
    settings = timm_settings(tmp_path, "torch/fashion_mnist", in_memory=28, hash_files=True)
    transform = {
        **{"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)},
        **{"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"},
    }
    data = prepared(settings, tmp_path / "m", transform)
    assert len(data.manifest.classes) == 10
    assert data.manifest.classes[0] == "T-shirt/top"
    for split, (images, labels) in splits.items():
        assert torch.equal(everything(data, split)[:, 0], torch.from_numpy(images).float() / 255)
        assert data.labels(split).tolist() == labels.tolist()
    assert len({entry.sha256 for entry in data.manifest.splits["train"]}) == 12


def test_labels_with_more_than_a_class_are_asked_for_one_by_one(tmp_path: Path) -> None:
    raw, draw = tmp_path / "QMNIST" / "raw", np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 4)):
        idx(raw / f"qmnist-{split}-images-idx3-ubyte", draw.integers(0, 256, (count, 28, 28), dtype=np.uint8), 8)
        labels = np.arange(count * 8, dtype=np.int32).reshape(count, 8) % 9
        idx(raw / f"qmnist-{split}-labels-idx2-int", labels, 12)
    found = prepare(timm_settings(tmp_path, "torch/qmnist"), tmp_path / "m")
    assert found.labels("train").tolist() == [number * 8 % 9 for number in range(9)]


@pytest.mark.parametrize(("train", "test"), [("training set", "val"), ("train", "training"), ("train", "train")])
def test_same_split_twice_is_a_config_error(train: str, test: str, tmp_path: Path) -> None:
    draw_mnist(tmp_path)
    said = f"are both '{train}': the reported" if train == test else f"are \\('{train}', '{test}'\\), which torch/"
    with pytest.raises(ConfigError, match=f"data.train and data.test {said}"):
        prepare(timm_settings(tmp_path, "torch/fashion_mnist", train=train, test=test), tmp_path / "m")


def test_torchvision_downloads_when_prepared_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_mnist(tmp_path)
    asked, create = [], timm.data.create_dataset

    def noted(*args: Any, download: bool, **how: Any) -> Any:
        asked.append(download)
        return create(*args, download=download, **how)

    monkeypatch.setattr(timm.data, "create_dataset", noted)
    prepared(timm_settings(tmp_path, "torch/fashion_mnist"), tmp_path / "m")
    assert asked == [True, True, False, False]
    shutil.rmtree(tmp_path / "FashionMNIST")
    with pytest.raises(DataError, match=r"data\.dataset 'torch/fashion_mnist', split 'train': Dataset not found"):
        open_data(tmp_path / "m", timm_settings(tmp_path, "torch/fashion_mnist"), AugmentationSettings(), {})


# What cannot be read


@pytest.mark.parametrize("dataset", ["tfds/cifar10", "wds/shards", "hfids/org/name", "HFIDS/org/name"])
def test_streams_are_refused(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data\.dataset is '{dataset}', which timm only streams; allowed: torch/"):
        prepare(timm_settings(tmp_path, dataset), tmp_path / "m")


def test_unknown_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'torch/nothing', split 'train': Unknown torchvision dataset nothing$"):
        prepare(timm_settings(tmp_path, "torch/nothing"), tmp_path / "m")


@pytest.mark.parametrize("error", [ImportError("Please install Hugging Face datasets package\nnow"), OSError()])
def test_what_timm_raises_is_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(timm.data, "create_dataset", refuse)
    with pytest.raises(DataError, match=r"^data\.dataset 'hfds/org/name', split 'train': .") as caught:
        prepare(timm_settings(tmp_path, "hfds/org/name"), tmp_path / "m")
    assert "\n" not in str(caught.value)


class HuggingFace:
    """As timm reads its data sets: labels in a column, images as files."""

    def __init__(self, labels: list[int], broken: frozenset[int] = frozenset()) -> None:
        self.labels, self.broken, self.reader = labels, broken, self
        self.class_to_idx = {"b": 1, "a": 0}

    def __len__(self) -> int:
        return len(self.labels)

    def iter_targets(self) -> Any:
        yield from self.labels

    def __getitem__(self, number: int) -> Any:
        if number in self.broken:
            raise KeyError(f"no image {number}")
        file = io.BytesIO()
        Image.new("RGB", (40, 40), (number, 0, 0)).save(file, "png")
        file.seek(0)
        return file, self.labels[number]


def given(monkeypatch: pytest.MonkeyPatch, make: Callable[[str], HuggingFace]) -> DataSettings:
    monkeypatch.setattr(timm.data, "create_dataset", lambda name, split, **how: make(split))
    return DataSettings(name="hub", source="timm", dataset="hfds/org/name", calibration=2)


def test_hugging_faces_labels_are_read_from_their_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(monkeypatch, lambda split: HuggingFace([1, 0, 1], broken=frozenset([2])))
    data = prepared(settings, tmp_path / "m")  # listing opens no image
    assert data.manifest.classes == ("a", "b")
    assert data.labels("train").tolist() == [1, 0, 1]
    assert data.images("test", np.array([1]), None).shape == (1, 3, 32, 32)
    with pytest.raises(DataError, match=r"hfds/org/name, image test/2 cannot be read as an image: 'no image 2'"):
        data.images("test", np.arange(3), None)


@pytest.mark.parametrize("label", [-1, 2])
def test_images_without_a_class_raise(label: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(monkeypatch, lambda split: HuggingFace([0, 1, label if split == "val" else 1]))
    with pytest.raises(DataError, match=rf"hfds/org/name: an image is of class {label}, but there are 2 classes"):
        prepare(settings, tmp_path / "m")


def test_empty_data_set_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(monkeypatch, lambda split: HuggingFace([0, 1] if split == "train" else []))
    with pytest.raises(DataError, match=r"'hfds/org/name', split 'val' is empty"):
        prepare(settings, tmp_path / "m")
