"""Picture files of a split: which there are, their sizes, and that no other split has the same."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskllm4v.data.decoded import shown_size
from maskllm4v.data.folder import SUFFIXES, few_faults, is_other_image, not_utf8, verify_image, warn_of_others
from maskllm4v.data.manifest import Entry
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.io import file_digest
from maskllm4v.utils.text import few, one_line

# From this share of the reported split on, pictures that are in the training split, too, are an error; a published
# benchmark may have a few, which are told.
LEAK = 0.01

Size = tuple[int, int]  # height and width


def pictures_below(folder: Path, suffix: str | None) -> list[Path]:
    """All pictures in a folder and those in it, sorted by path.

    Args:
        folder: where to look; links are followed.
        suffix: what their names end in; None: any of :data:`~maskllm4v.data.folder.SUFFIXES`.

    Raises:
        DataError: the folder is missing, holds none, or a name that is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    files = sorted(Path(above) / name for above, _, names in os.walk(folder, followlinks=True) for name in names)
    if faults := [fault for path in files if (fault := not_utf8(path))]:
        raise DataError(few_faults(faults))

    def is_picture(path: Path) -> bool:
        return path.suffix.lower() in SUFFIXES if suffix is None else path.name.endswith(suffix)

    found = [path for path in files if is_picture(path)]
    if not found:
        raise DataError(f"{folder} holds no picture ({suffix or ', '.join(sorted(SUFFIXES))})")
    warn_of_others(folder, [path.relative_to(folder).as_posix() for path in files if is_other_image(path.name)])
    return found


def file_entry(path: Path, root: Path, label: int, *, hashed: bool) -> Entry:
    """A line of the manifest for a file.

    Raises:
        OSError: it is missing, empty, or cannot be read; or it is to be hashed and is no image.
    """
    size = path.stat().st_size  # follows links: a broken one is missing
    if not path.is_file():
        raise OSError("is no file")
    if not size:
        raise OSError("is empty")
    if not os.access(path, os.R_OK):
        raise OSError("cannot be read: permission denied")
    if hashed:
        verify_image(path)
    return Entry(path.relative_to(root).as_posix(), label, size, file_digest(path) if hashed else "")


def stored_size(path: Path) -> tuple[Size, bool]:
    """Height and width of a picture as EXIF turns it, and whether that swaps them.

    Raises:
        OSError: it is no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            (width, height), turned = shown_size(image), shown_size(image) != image.size
    except Exception as error:  # decoders raise whatever they like
        raise OSError(f"cannot be read as an image: {one_line(error)}") from error
    return (height, width), turned


def size_fault(picture: Path, known: Size, of: str) -> str:
    """What is wrong with a picture whose annotation is for another size; empty if nothing is.

    Raises:
        OSError: the picture cannot be read.
    """
    size, turned = stored_size(picture)
    if size == known:
        return ""
    if turned and size[::-1] == known:
        return f"{picture} is turned by EXIF, but {of} is for the picture before that; turn one or remove the EXIF tag"
    return f"{picture} has {_by(size)} pixels, but {of} {_by(known)}"


def _by(size: Size) -> str:
    return f"{size[1]}×{size[0]}"


def check_disjoint(root: Path, splits: Mapping[str, Sequence[Entry]]) -> None:
    """Raise :class:`DataError` where the reported split has pictures of the training split, by whatever name.

    The same file reached by two paths, or two files with the same bytes; a few of the latter are only warned about
    (:data:`LEAK`).
    """
    trained = {_real(root, entry): entry.path for entry in splits["train"]}
    if shared := [entry.path for entry in splits["test"] if _real(root, entry) in trained]:
        raise DataError(f"{few(shared, 'picture')} of the test split {_are(shared)} in the training split, too")
    sizes = {entry.bytes for entry in splits["train"]} & {entry.bytes for entry in splits["test"]}
    by_digest: dict[str, str] = {}
    for entry in _hashed(root, splits["train"], sizes):
        by_digest.setdefault(entry.sha256, entry.path)
    alike = [(e.path, by_digest[e.sha256]) for e in _hashed(root, splits["test"], sizes) if e.sha256 in by_digest]
    if not alike:
        return
    told = f"{len(alike)} of {len(splits['test'])} test pictures have the bytes of training pictures: " + few(
        [f"{path} is {other}" for path, other in alike], quoted=False
    )
    if len(alike) >= LEAK * len(splits["test"]):
        raise DataError(f"{told}; the reported images would be trained on")
    warnings.warn(told, stacklevel=2)


def _are(names: Sequence[Any]) -> str:
    return "are" if len(names) > 1 else "is"


def _real(root: Path, entry: Entry) -> str:
    return os.path.realpath(root / entry.path)


def _hashed(root: Path, entries: Sequence[Entry], sizes: set[int]) -> list[Entry]:
    """Those of some sizes, with their digests."""
    chosen = [entry for entry in entries if entry.bytes in sizes]
    return [e if e.sha256 else replace(e, sha256=file_digest(root / e.path)) for e in chosen]
