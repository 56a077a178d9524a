"""Image folders: ``<root>/<split>/<class>/<image>``, as ImageNet is laid out."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskllm4v.config import DataSettings
from maskllm4v.data.manifest import Entry, Manifest, write_manifest
from maskllm4v.data.seals import verify
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.io import file_digest
from maskllm4v.utils.progress import bar
from maskllm4v.utils.text import few, one_line

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
OTHER_SUFFIXES = {  # of images, too; left out, but not without a word
    *(".avif", ".dng", ".exr", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jxl"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".svg", ".tga", ".tif", ".tiff"),
}
SHOWN = 5  # faults that an error message names


def prepare_folder(settings: DataSettings, folder: Path) -> Manifest:
    """List the images of both splits by path and size; nothing is copied.

    With ``hash_files`` every file is read, checked to be an image, and hashed.

    Raises:
        DataError: a folder is missing or empty, files cannot be read, or the splits' classes differ.
    """
    root = Path(settings.root or "")
    if fault := not_utf8(root):
        raise DataError(fault)
    classes = _classes(root / settings.train)
    if (other := _classes(root / settings.test)) != classes:
        odd = sorted(set(classes) ^ set(other))
        raise DataError(
            f"{root}: {settings.train} has {len(classes)} classes and {settings.test} {len(other)}; "
            f"they differ in {few_faults(odd)}"
        )
    if settings.classes not in (None, len(classes)):
        raise DataError(f"data.classes is {settings.classes}, but {root / settings.train} has {len(classes)} classes")
    names = (settings.train, settings.test)
    listed = {name: _entries(root, name, classes, settings.hash_files) for name in dict.fromkeys(names)}
    splits = {"train": listed[settings.train], "test": listed[settings.test]}
    return write_manifest(
        folder, settings=settings, classes=classes, splits=splits, extra={"root": str(root)}, files=root
    )


def reader(manifest: Manifest, settings: DataSettings) -> Callable[[Entry], tuple[Any, str]]:
    """What opens an image: gives a file or path for PIL, and its name for messages.

    An image that was hashed is hashed again; of others the size is compared.

    Raises:
        DataError: one of the files that were looked at more closely has changed.
    """
    verify(manifest.looks)
    return file_reader(Path(manifest.extra["root"]))


def file_reader(root: Path) -> Callable[[Entry], tuple[Any, str]]:
    """What opens files below a folder, see :func:`reader`."""

    def read(entry: Entry) -> tuple[Any, str]:
        path = root / entry.path
        try:
            content = path.read_bytes() if entry.sha256 else None
            size = path.stat().st_size if content is None else len(content)
        except OSError:
            return path, str(path)  # whoever decodes it says why it cannot be read
        if size != entry.bytes or (content is not None and hashlib.sha256(content).hexdigest() != entry.sha256):
            raise DataError(
                f"{path} cannot be read as what was prepared: it has changed since; run the prepare stage again"
            )
        return path if content is None else io.BytesIO(content), str(path)

    return read


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected {folder}/<class>/<image>")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if faults := [fault for name in classes if (fault := not_utf8(folder / name))]:
        raise DataError(few_faults(faults))
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/<class>/<image>")
    return classes


def _entries(root: Path, split: str, classes: list[str], hash_files: bool) -> list[Entry]:
    found: list[Entry] = []
    faults: list[str] = []
    others: list[str] = []
    for label, name in enumerate(bar(classes, f"listing {split}")):
        with os.scandir(root / split / name) as listing:
            listed = sorted(listing, key=lambda f: f.name)
        files = [file for file in listed if Path(file.name).suffix.lower() in SUFFIXES]
        own_others = [f"{name}/{file.name}" for file in listed if is_other_image(file.name)]
        if not files:
            but = f", but {few(own_others)}" if own_others else ""
            faults.append(f"{root / split / name} holds no image ({', '.join(sorted(SUFFIXES))}){but}")
        others += own_others
        for file in files:
            path, digest = Path(file.path), ""
            if fault := not_utf8(path):
                faults.append(fault)
                continue
            try:
                size = file.stat().st_size  # follows links: a broken one is missing
                if not file.is_file():
                    raise OSError("is no file")
                if not size:
                    raise OSError("is empty")
                if not os.access(path, os.R_OK):
                    raise OSError("cannot be read: permission denied")
                if hash_files:
                    verify_image(path)
                    digest = file_digest(path)
            except OSError as error:
                faults.append(f"{path} {error.strerror or error}")
                continue
            found.append(Entry(path.relative_to(root).as_posix(), label, size, digest))
    if faults:
        raise DataError(few_faults(faults))
    warn_of_others(root / split, others)
    return found


def is_other_image(name: str) -> bool:
    """Whether a file is an image by its name, of a type that is not read."""
    return Path(name).suffix.lower() in OTHER_SUFFIXES


def warn_of_others(folder: Path, names: Sequence[str]) -> None:
    """Count and name the image files of a folder that are left out."""
    if names:
        warnings.warn(
            f"{folder}: {len(names):,} image files of other types are left out: {few(names)}; "
            f"read are {', '.join(sorted(SUFFIXES))}",
            stacklevel=2,
        )


def not_utf8(path: Path) -> str:
    """What is wrong with a name that is not UTF-8, which no manifest can hold; empty if nothing is."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"{os.fsencode(path).decode('utf-8', 'backslashreplace')} is a name that is not UTF-8; rename it"
    return ""


def verify_image(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # decoders raise whatever they like
        raise OSError(f"cannot be read as an image: {one_line(error)}") from error


def few_faults(items: list[str]) -> str:
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
