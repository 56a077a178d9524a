"""Data sets that ``timm.data.create_dataset`` opens and indexes: torchvision's, Hugging Face's, tar files.

An entry's path is ``<split>/<index>``. Images are opened through timm's readers, not through its data set
class, which passes over files that cannot be read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskllm4v.config import DataSettings
from maskllm4v.data.decoded import decode
from maskllm4v.data.manifest import Entry, Manifest, write_manifest
from maskllm4v.errors import ConfigError, DataError
from maskllm4v.progress import bar

STREAMS = ("hfids", "tfds", "wds")  # timm iterates over these; an image cannot be asked for by its number
# What torchvision, timm's readers and Hugging Face raise for sources that are missing or damaged.
FAULTS = (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def prepare_timm(settings: DataSettings, folder: Path) -> Manifest:
    """Number the images of both splits; what torchvision can download is downloaded if it is missing.

    With ``hash_files`` every image is decoded, and its pixels are hashed.

    Raises:
        ConfigError: the data set can only be streamed.
        DataError: it is unknown or missing, or its splits' classes differ.
    """
    opened = {split: _open(settings, split, download=True) for split in ("train", "test")}
    classes = _classes(opened["train"])
    if _classes(opened["test"]) != classes:
        raise DataError(f"{settings.dataset}: {settings.train} and {settings.test} have different classes")
    splits = {split: _entries(settings, split, dataset) for split, dataset in opened.items()}
    highest = max(entry.label for entries in splits.values() for entry in entries)
    names = classes or [str(label) for label in range(highest + 1)]
    if highest >= len(names):
        raise DataError(f"{settings.dataset}: an image is of class {highest}, but there are {len(names)} classes")
    return write_manifest(folder, settings=settings, classes=names, splits=splits, extra={})


def reader(manifest: Manifest, settings: DataSettings) -> Callable[[Entry], tuple[Any, str]]:
    """What opens an image: gives a file or a PIL image, and its name for messages.

    Raises:
        DataError: the data set is gone, or has not as many images as the manifest says.
    """
    opened = {split: _open(settings, split, download=False) for split in ("train", "test")}
    listed = {"test": len(manifest.splits["test"])}
    listed["train"] = sum(len(entries) for split, entries in manifest.splits.items() if split != "test")
    for split, dataset in opened.items():
        if len(dataset) != listed[split]:
            said = f"{settings.dataset}: {split} has {len(dataset)} images, the manifest {listed[split]}"
            raise DataError(f"{said}; run prepare again")

    def read(entry: Entry) -> tuple[Any, str]:
        split, _, number = entry.path.partition("/")
        return _image(opened[split], int(number)), f"{settings.dataset}, image {entry.path}"

    return read


def _open(settings: DataSettings, split: str, *, download: bool) -> Any:
    from timm.data import create_dataset

    name, wanted = settings.dataset or "", settings.train if split == "train" else settings.test
    if name.partition("/")[0].lower() in STREAMS:
        raise ConfigError(
            f"data.dataset is {name!r}, which timm only streams; allowed: torch/<name>, hfds/<name>, '' for a folder "
            "or tar file"
        )
    try:
        dataset = create_dataset(name, root=settings.root, split=wanted, download=download)
        count = len(dataset)
    except FAULTS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data.dataset {name!r}, split {wanted!r}: {said}") from error
    if not count:
        raise DataError(f"data.dataset {name!r}, split {wanted!r} is empty")
    return dataset


def _classes(dataset: Any) -> list[str]:
    """Names in the order of the labels; empty where the data set has none."""
    owner = getattr(dataset, "reader", dataset)
    numbers = getattr(owner, "class_to_idx", None) or {}
    return [str(name) for name in sorted(numbers, key=numbers.__getitem__)]


def _entries(settings: DataSettings, split: str, dataset: Any) -> list[Entry]:
    def read(entry: Entry) -> tuple[Any, str]:
        return _image(dataset, int(entry.path.partition("/")[2])), f"{settings.dataset}, image {entry.path}"

    found = []
    for number, label in enumerate(bar(_labels(dataset), f"listing {split}", total=len(dataset))):
        entry = Entry(f"{split}/{number}", int(label), 0, "")  # sizes on disk: not known
        if settings.hash_files:
            entry = replace(entry, sha256=hashlib.sha256(decode(read, entry, "RGB").tobytes()).hexdigest())
        found.append(entry)
    return found


def _labels(dataset: Any) -> Iterator[Any]:
    """All labels, without decoding images where the source can do so."""
    owner = getattr(dataset, "reader", dataset)
    if hasattr(owner, "iter_targets"):  # Hugging Face
        yield from owner.iter_targets()
    elif hasattr(owner, "targets"):  # most of torchvision
        yield from owner.targets
    elif hasattr(owner, "samples"):  # folders, tar files
        yield from (sample[1] for sample in owner.samples)
    else:
        yield from (owner[number][1] for number in range(len(owner)))


def _image(dataset: Any, number: int) -> Any:
    if not hasattr(dataset, "reader"):
        return dataset[number][0]
    with dataset.reader[number][0] as file:
        return io.BytesIO(file.read())
