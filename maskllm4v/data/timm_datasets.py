"""Data sets that ``timm.data.create_dataset`` opens and indexes: torchvision's, Hugging Face's, tar files.

An entry's path is ``<split>/<index>``. Images are opened through timm's readers, not through its data set
class, which passes over files that cannot be read.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.config import DataSettings
from maskllm4v.data.decoded import Read, decode
from maskllm4v.data.manifest import Entry, Manifest, write_manifest
from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.progress import bar
from maskllm4v.utils.text import one_line

INDEXED = ("torch", "hfds")  # everything else is a folder or a tar file, and so are these two:
FOLDERS = ("torch/folder", "torch/image_folder")
STREAMS = ("hfids", "tfds", "wds")  # timm iterates over these; an image cannot be asked for by its number
# What torchvision, timm's readers and Hugging Face raise for sources that are missing or damaged.
FAULTS = (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def prepare_timm(settings: DataSettings, folder: Path) -> Manifest:
    """Number the images of both splits; what torchvision can download is downloaded if it is missing.

    With ``hash_files`` every image is decoded, and its pixels are hashed.

    Raises:
        ConfigError: the data set can only be streamed, or takes two names for the same split.
        DataError: it is unknown or missing, its splits' classes differ, or images have no class.
    """
    opened = {split: _open(settings, split, download=True) for split in ("train", "test")}
    asked = (settings.train, settings.test)
    if len(set(asked)) > len({getattr(dataset, "train", split) for split, dataset in opened.items()}):  # torchvision's
        raise ConfigError(f"data.train and data.test are {asked}, which {_name(settings)} takes for the same split")
    classes = _classes(opened["train"])
    if _classes(opened["test"]) != classes:
        raise DataError(f"{_name(settings)}: {settings.train} and {settings.test} have different classes")
    read = _reader(settings, opened)
    splits = {split: _entries(settings, split, dataset, read) for split, dataset in opened.items()}
    labels = {entry.label for entries in splits.values() for entry in entries}
    names = classes or [str(label) for label in range(max(labels) + 1)]
    if strange := labels - set(range(len(names))):
        raise DataError(f"{_name(settings)}: an image is of class {min(strange)}, but there are {len(names)} classes")
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
            said = f"{_name(settings)}: {split} has {len(dataset)} images, the manifest {listed[split]}"
            raise DataError(f"{said}; run prepare again")
    return _reader(settings, opened)


def _reader(settings: DataSettings, opened: Mapping[str, Any]) -> Callable[[Entry], tuple[Any, str]]:
    reading = os.getpid()

    def read(entry: Entry) -> tuple[Any, str]:
        nonlocal reading
        if reading != (reading := os.getpid()):  # a loader's worker, forked from the process that read before
            for dataset in opened.values():
                _forget_open_files(dataset)
        split, _, digits = entry.path.partition("/")
        dataset, number = opened[split], int(digits)
        name = f"{_name(settings)}, image {entry.path}{_file(dataset, number)}"
        try:
            image = _image(dataset, number)
        except Exception as error:  # readers, and decoders in them, raise whatever they like
            raise DataError(f"{name} cannot be read as an image: {one_line(error)}") from error
        if entry.sha256 and _pixels(lambda _: (image, name), entry) != entry.sha256:
            raise DataError(f"{name} has changed since it was prepared; run the prepare stage again")
        return image, name

    return read


def _forget_open_files(dataset: Any) -> None:
    """Let timm open tar files anew: a fork shares the place in an open file, so that processes read each other's bytes.

    Other sources open a file for each image, or map them into memory.
    """
    state = getattr(getattr(dataset, "reader", None), "tar_state", None)
    for tar in state.values() if isinstance(state, dict) else filter(None, [state]):
        tar.reset()
        for child in tar.children.values():
            child.reset()


def _name(settings: DataSettings) -> str:
    return settings.dataset or str(settings.root)


def _open(settings: DataSettings, split: str, *, download: bool) -> Any:
    from timm.data import create_dataset

    name, wanted = settings.dataset or "", settings.train if split == "train" else settings.test
    kind = name.partition("/")[0].lower()
    if kind in STREAMS:
        raise ConfigError(
            f"data.dataset is {name!r}, which timm only streams; allowed: torch/<name>, hfds/<name>, '' for a folder "
            "or tar file"
        )
    place = Path(settings.root or "") / wanted
    if (kind not in INDEXED or name.lower() in FOLDERS) and not place.exists():
        raise DataError(f"data.dataset {name!r}: {place} is missing")  # timm would take all of root for the split
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
    numbers = getattr(owner, "class_to_idx", None) or getattr(owner, "class_name_to_idx", None) or {}  # tar: the latter
    return [str(name) for name in sorted(numbers, key=numbers.__getitem__)]


def _entries(settings: DataSettings, split: str, dataset: Any, read: Callable[[Entry], tuple[Any, str]]) -> list[Entry]:
    found = []
    for number, label in enumerate(bar(_labels(dataset), f"listing {split}", total=len(dataset))):
        entry = Entry(f"{split}/{number}", int(label), 0, "")  # sizes on disk: not known
        if settings.hash_files:
            entry = replace(entry, sha256=_pixels(read, entry))
        found.append(entry)
    return found


def _pixels(read: Read, entry: Entry) -> str:
    """SHA-256 of an image's pixels."""
    return hashlib.sha256(decode(read, entry, "RGB").tobytes()).hexdigest()


def _labels(dataset: Any) -> Iterator[Any]:
    """All labels, without decoding images where the source can do so."""
    owner = getattr(dataset, "reader", dataset)
    if hasattr(owner, "iter_targets"):  # Hugging Face
        yield from owner.iter_targets()
    elif hasattr(owner, "targets") and not np.ndim(owner.targets[0]):  # most of torchvision, tar files
        yield from owner.targets
    elif hasattr(owner, "samples"):  # folders
        yield from (sample[1] for sample in owner.samples)
    else:
        yield from (owner[number][1] for number in range(len(owner)))


def _image(dataset: Any, number: int) -> Any:
    if not hasattr(dataset, "reader"):
        return dataset[number][0]
    with dataset.reader[number][0] as file:
        return io.BytesIO(file.read())


def _file(dataset: Any, number: int) -> str:
    """What the source calls an image, if it is a file."""
    samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
    return "" if samples is None else f" ({getattr(samples[number][0], 'name', samples[number][0])})"
