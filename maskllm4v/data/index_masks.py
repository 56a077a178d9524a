"""Folders of pictures and index masks, one 8-bit class index per pixel: ADE20K, Cityscapes, Pascal VOC, own masks.

A mask's path below its folder is its picture's below the other, with ``data.suffix`` for its ending.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.config import DataSettings
from maskllm4v.config.sections import JointAugmentationSettings
from maskllm4v.data.annotated import IGNORED, Objects
from maskllm4v.data.annotated_files import AnnotatedFiles
from maskllm4v.data.decoded import ORIENTATION, Read
from maskllm4v.data.folder import few_faults, file_reader
from maskllm4v.data.manifest import Entry, Manifest, hold_out, read_entries, spread, write_entries, write_manifest
from maskllm4v.data.pictures import check_disjoint, file_entry, pictures_below, size_fault
from maskllm4v.data.seals import verify
from maskllm4v.utils.errors import DataError, UserError
from maskllm4v.utils.io import read_text
from maskllm4v.utils.progress import bar
from maskllm4v.utils.text import few, one_line

VALUES = 256  # that a pixel of 8 bits may have
UNKNOWN = -1  # what a value means that is neither a class nor ignored
SCALED = ("L;2", "L;4")  # PNGs of 2 or 4 bits, whose grey levels PIL multiplies


def prepare_masks(settings: DataSettings, folder: Path) -> Manifest:
    """List pictures and masks of both splits; every mask is decoded and its values are checked, nothing is copied.

    An entry's label is how many classes its mask shows.

    Raises:
        DataError: the files or the settings do not go together; the message names the first few files.
    """
    assert settings.masks is not None
    root = Path(settings.root or "")
    classes = class_names(settings)
    meaning = Meaning(len(classes), settings.ignored, zero_is_ignored=settings.zero_is_ignored)
    pictures, masks, seen = {}, {}, {}
    for split in ("train", "test"):
        places = root / getattr(settings, split), root / getattr(settings.masks, split)
        pictures[split], masks[split], seen[split] = _entries(settings, root, places, meaning)
    check_disjoint(root, pictures)
    for split, entries in hold_out(pictures, settings).items():
        if not any(entry.label for entry in entries):
            raise DataError(f"{settings.name}: none of the {len(entries)} masks of the {split} split has a valid pixel")
    if absent := [name for name, found in zip(classes, seen["train"], strict=True) if not found]:
        warnings.warn(f"{settings.name}: no training mask has a pixel of {few(absent)}", stacklevel=2)
    written = {
        split: write_entries(_masks_file(folder, split), entries)
        for split, entries in hold_out(masks, settings).items()
    }
    extra: dict[str, Any] = {"root": str(root), "masks": written, "mask_classes": classes}
    extra |= {"ignored": settings.ignored, "zero_is_ignored": settings.zero_is_ignored}
    beside = [] if settings.hash_files else [root / entry.path for entry in spread(masks)]
    return write_manifest(
        folder, settings=settings, classes=classes, splits=pictures, extra=extra, files=root, beside=beside
    )


def open_masks(
    manifest: Manifest, folder: Path, augmentation: JointAugmentationSettings, transform: Mapping[str, Any]
) -> AnnotatedFiles:
    """The pictures and masks behind a manifest.

    Raises:
        DataError: the list of masks, or a file that was looked at more closely, has changed.
    """
    read = file_reader(Path(manifest.extra["root"]))
    verify(manifest.looks)
    return AnnotatedFiles(manifest, read, IndexMasks(manifest, folder, read), augmentation, transform)


class IndexMasks:
    """Masks of a manifest's pictures; see :class:`~maskllm4v.data.annotated_files.Annotations`."""

    def __init__(self, manifest: Manifest, folder: Path, read: Read) -> None:
        extra = manifest.extra
        self.mask_classes = tuple(extra["mask_classes"])
        self._read = read
        self._masks = {
            split: read_entries(_masks_file(folder, split), facts) for split, facts in extra["masks"].items()
        }
        self._meaning = Meaning(len(self.mask_classes), extra["ignored"], zero_is_ignored=extra["zero_is_ignored"])

    def mask(self, split: str, index: int) -> np.ndarray:
        source, name = self._read(self._masks[split][index])
        try:
            return self._meaning.classes(mask_values(source))
        except ValueError as error:
            raise DataError(f"{name} {error}") from error

    def objects(self, split: str, index: int) -> Objects:
        return Objects.of(np.empty((0, 4)), np.empty(0, np.int64))

    def check_size(self, split: str, index: int, size: tuple[int, int], name: str) -> None:
        """The mask is compared itself."""


class Meaning:
    """Which class a mask's values stand for.

    Args:
        classes: how many there are.
        ignored: the value of pixels without a class.
        zero_is_ignored: 0 is one, too, and k stands for class k - 1.

    Raises:
        DataError: ``ignored`` is a class's value, or there are more classes than values.
    """

    def __init__(self, classes: int, ignored: int, *, zero_is_ignored: bool) -> None:
        self.first, self.last = int(zero_is_ignored), int(zero_is_ignored) + classes - 1
        if self.first <= ignored <= self.last:
            raise DataError(
                f"data.ignored is {ignored}, but the {classes} classes have the values {self.first} to {self.last}"
                + ("; where 0 is no class, set data.zero_is_ignored instead" if ignored == 0 else "")
            )
        if self.last >= VALUES or classes > IGNORED:
            raise DataError(f"data.classes names {classes} classes, more than masks of 8 bits can tell apart")
        self.ignored = {ignored, *([0] if zero_is_ignored else [])}
        self._table = np.full(VALUES, UNKNOWN, np.int16)
        self._table[self.first : self.last + 1] = np.arange(classes)
        self._table[sorted(self.ignored)] = IGNORED

    def classes(self, values: np.ndarray) -> np.ndarray:
        """The class of each pixel or :data:`IGNORED`, uint8 ``[h, w]``.

        Raises:
            ValueError: a value is neither; the message is to follow a file's name.
        """
        found = self._table[values]
        if (unknown := found == UNKNOWN).any():
            odd, counts = np.unique(values[unknown], return_counts=True)
            allowed = f"{self.first} to {self.last}, and {' and '.join(map(str, sorted(self.ignored)))} for ignored"
            raise ValueError(f"has the value {odd[0]} in {counts[0]:,} pixels, which is no class; allowed: {allowed}")
        return found.astype(np.uint8)


def mask_values(source: Any) -> np.ndarray:
    """What a mask's file holds, uint8 ``[h, w]``: of palettes the indices, for converting would give their colours.

    Args:
        source: a path or file.

    Raises:
        ValueError: it is no image of one 8-bit value per pixel; the message is to follow a file's name.
    """
    from PIL import Image

    try:
        with Image.open(source) as image:
            mode, kind, raw = image.mode, image.format, str(image.tile[0].args) if image.tile else ""
            turned = image.getexif().get(ORIENTATION, 1) != 1
            values = np.array(image)
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f"cannot be read as an image: {one_line(error)}") from error
    if mode not in ("L", "P", "1"):
        what = "has 16 bits per pixel or more" if mode.startswith(("I", "F")) else f"is a picture of mode {mode}"
        raise ValueError(f"{what}; allowed: one 8-bit class index per pixel, with a palette or grey")
    if kind == "JPEG":
        raise ValueError("is a JPEG, which changes values; allowed: PNG, or another type without loss")
    if raw in SCALED:
        raise ValueError(f"has {raw[-1]} bits per pixel of grey; allowed: 8, or a palette")
    if turned:
        raise ValueError("is turned by EXIF; save it without that tag")
    return values.astype(np.uint8)


def class_names(settings: DataSettings) -> list[str]:
    """Those that ``data.classes`` lists, or the file that it names holds, one per line.

    Raises:
        DataError: the file cannot be read, a name is empty or there twice.
    """
    names, origin = settings.classes, "data.classes"
    if isinstance(names, str):
        path = Path(settings.root or "") / names
        try:
            names, origin = read_text(path).rstrip().splitlines(), str(path)
        except UserError as error:
            raise DataError(f"data.classes: {error}") from error
    assert isinstance(names, list)
    names = [name.strip() for name in names]
    if "" in names or not names:
        raise DataError(f"{origin} has no name of class {names.index('') if names else 0}; expected: one per line")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{origin} has {few(twice, 'class name')} twice")
    return names


def _entries(
    settings: DataSettings, root: Path, places: tuple[Path, Path], meaning: Meaning
) -> tuple[list[Entry], list[Entry], np.ndarray]:
    """Pictures, masks, and how many masks show each class."""
    pictures: list[Entry] = []
    masks: list[Entry] = []
    faults: list[str] = []
    seen = np.zeros(VALUES, np.int64)
    taken: dict[Path, Path] = {}
    for picture in bar(pictures_below(places[0], settings.image_suffix), f"checking masks of {places[0].name}"):
        name = picture.relative_to(places[0])
        ending = settings.image_suffix or name.suffix
        mask = places[1] / name.parent / (name.name.removesuffix(ending) + settings.suffix)
        if mask in taken:
            faults.append(f"duplicate file names: {taken[mask]} and {picture} have the same mask {mask}")
            continue
        taken[mask] = picture
        if not mask.exists():
            faults.append(f"{picture} has no mask: {mask} is missing")
            continue
        current = mask
        try:
            found = meaning.classes(mask_values(mask))
            known = np.unique(found[found != IGNORED])
            masks.append(file_entry(mask, root, len(known), hashed=settings.hash_files))
            current = picture
            pictures.append(file_entry(picture, root, len(known), hashed=settings.hash_files))
            if fault := size_fault(picture, found.shape, f"its mask {mask}"):
                faults.append(fault)
            seen[known] += 1
        except (OSError, ValueError) as error:
            faults.append(f"{current} {getattr(error, 'strerror', None) or error}")
    if faults:
        raise DataError(few_faults(faults))
    return pictures, masks, seen[: meaning.last - meaning.first + 1]


def _masks_file(folder: Path, split: str) -> Path:
    return folder / f"{split}_masks.csv"
