"""Pictures with boxes in COCO's JSON format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.config import DataSettings, JointAugmentationSettings
from maskllm4v.data.annotated import Objects, load_arrays, save_arrays
from maskllm4v.data.annotated_files import AnnotatedFiles
from maskllm4v.data.coco_json import CocoFile, read_coco
from maskllm4v.data.folder import few_faults, file_reader
from maskllm4v.data.manifest import Entry, Manifest, hold_out, write_manifest
from maskllm4v.data.pictures import Size, check_disjoint, file_entry, size_fault
from maskllm4v.data.seals import verify
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.io import file_digest
from maskllm4v.utils.progress import bar
from maskllm4v.utils.text import few


def prepare_coco(settings: DataSettings, folder: Path) -> Manifest:
    """Check both JSON files and the sizes of their pictures; write the boxes to ``folder``. No picture is copied.

    An entry's label is how many objects it shows without crowds. Classes are numbered in the order of categories' ids.

    Raises:
        DataError: the files do not go together; the message names the first few files or ids.
    """
    assert settings.annotations is not None
    root = Path(settings.root or "")
    paths = {split: root / getattr(settings.annotations, split) for split in ("train", "test")}
    files = {split: read_coco(path, settings.empty_boxes) for split, path in paths.items()}
    categories = files["train"].categories
    if odd := sorted(set(files["test"].categories.items()) ^ set(categories.items())):
        told = few([f"{number}: {name}" for number, name in odd])
        raise DataError(f"{paths['train']} and {paths['test']} have different categories; they differ in {told}")
    for split, found in files.items():
        if found.dropped:
            warnings.warn(f"{paths[split]}: {found.dropped} boxes without area are left out", stacklevel=2)
    entries = {split: _entries(settings, root, split, found) for split, found in files.items()}
    check_disjoint(root, entries)
    written = {}
    places = {split: {entry.path: i for i, entry in enumerate(own)} for split, own in entries.items()}
    for split, own in hold_out(entries, settings).items():
        if not any(entry.label for entry in own):
            raise DataError(f"{settings.name}: none of the {len(own)} images of the {split} split has an object")
        origin = "train" if split == "holdout" else split
        written[split] = _save(folder, split, files[origin], [places[origin][entry.path] for entry in own])
    return write_manifest(
        folder,
        settings=settings,
        classes=list(categories.values()),
        splits=entries,
        extra={
            "root": str(root),
            "objects": written,
            "category_ids": list(categories),
            "annotations": {split: {"path": str(path), "sha256": file_digest(path)} for split, path in paths.items()},
        },
        files=root,
        beside=list(paths.values()),
    )


def open_coco(
    manifest: Manifest, folder: Path, augmentation: JointAugmentationSettings, transform: Mapping[str, Any]
) -> AnnotatedFiles:
    """The pictures and boxes behind a manifest.

    Raises:
        DataError: the boxes, a JSON file, or a picture that was looked at more closely, has changed.
    """
    verify(manifest.looks)
    known = CocoBoxes(manifest, folder)
    return AnnotatedFiles(manifest, file_reader(Path(manifest.extra["root"])), known, augmentation, transform)


class CocoBoxes:
    """Boxes of a manifest's pictures; see :class:`~maskllm4v.data.annotated_files.Annotations`."""

    mask_classes: tuple[str, ...] = ()

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        digests = manifest.extra["objects"]
        self._arrays = {split: load_arrays(_objects_file(folder, split), digest) for split, digest in digests.items()}

    def mask(self, split: str, index: int) -> None:
        return None

    def objects(self, split: str, index: int) -> Objects:
        arrays = self._arrays[split]
        own = slice(*arrays["first"][index : index + 2])
        return Objects(*(arrays[name][own] for name in Objects._fields))

    def check_size(self, split: str, index: int, size: Size, name: str) -> None:
        known = self._arrays[split]["sizes"][index]
        if tuple(known) != size:
            raise DataError(
                f"{name} has {size[1]}×{size[0]} pixels, but was prepared with {known[1]}×{known[0]}; "
                "run the prepare stage again"
            )


def _entries(settings: DataSettings, root: Path, split: str, found: CocoFile) -> list[Entry]:
    folder = root / getattr(settings, split)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    entries: list[Entry] = []
    faults: list[str] = []
    for image, objects in zip(bar(found.images, f"checking {split}"), found.objects, strict=True):
        path = folder / image.file_name
        try:
            entries.append(file_entry(path, root, int((~objects.crowds).sum()), hashed=settings.hash_files))
            if fault := size_fault(path, image.size, f"image {image.id} of the JSON"):
                faults.append(fault)
        except (OSError, ValueError) as error:
            faults.append(f"{path} {getattr(error, 'strerror', None) or error}")
    if faults:
        raise DataError(few_faults(faults))
    return entries


def _save(folder: Path, split: str, found: CocoFile, rows: Sequence[int]) -> str:
    """Write the objects of some images, one after the other; returns the file's digest."""
    objects = [found.objects[i] for i in rows]
    counts = [0, *(len(one.classes) for one in objects)]
    arrays = {name: np.concatenate([getattr(one, name) for one in objects]) for name in Objects._fields}
    arrays |= {"first": np.cumsum(counts), "sizes": np.array([found.images[i].size for i in rows], np.int64)}
    return save_arrays(_objects_file(folder, split), arrays)


def _objects_file(folder: Path, split: str) -> Path:
    return folder / f"{split}_objects.safetensors"
