"""Seals of manifests: which ones ``prepare`` wrote, and how some of their files looked.

A seal lies beside the folder of its manifest (``<folder>.seal.json``), for what is in the folder is hashed by DVC and
named in records. It lists all manifests that were ever written there: DVC may bring an older one back. A folder
without a seal (DVC restored it in a new clone) is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskllm4v.utils.errors import DataError, UserError
from maskllm4v.utils.io import read_json, write_json

SAMPLE = 64  # files of a split


@dataclass(frozen=True)
class Look:
    """How a file looked: its size, its time of change in ns."""

    bytes: int
    time: int


Looks = Mapping[str, Look]  # by path


def seal_of(folder: Path) -> Path:
    """Where a folder's seal lies."""
    return folder.with_name(f"{folder.name}.seal.json")


def seal(folder: Path, digest: str, files: Sequence[Path] = ()) -> None:
    """Add a manifest to the seal of its folder.

    Args:
        folder: of the manifest.
        digest: SHA-256 of the manifest.
        files: those whose look is kept.
    """
    try:
        known = _read(seal_of(folder)) or {}
    except DataError:
        known = {}
    looks = {str(path): _look(path) for path in files}
    text = {key: {path: vars(look) for path, look in value.items()} for key, value in {**known, digest: looks}.items()}
    write_json(seal_of(folder), text)


def sealed(folder: Path, digest: str) -> Looks:
    """The looks that were kept with a manifest; empty where the folder has no seal.

    Raises:
        DataError: the manifest is not one that was written there, or the seal is damaged.
    """
    known = _read(seal_of(folder))
    if known is None:
        return {}
    if digest not in known:
        raise DataError(
            f"{folder / 'manifest.json'} was changed: it is none of those that {seal_of(folder)} lists; "
            "run the prepare stage again, or delete that file if DVC has brought the folder from elsewhere"
        )
    return known[digest]


def verify(looks: Looks) -> None:
    """Compare files with their looks.

    Raises:
        DataError: a file is missing, or has changed.
    """
    for name, look in looks.items():
        try:
            same = _look(Path(name)) == look
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}; run the prepare stage again") from error
        if not same:
            raise DataError(f"{name} has changed since it was prepared; run the prepare stage again")


def _look(path: Path) -> Look:
    status = path.stat()
    return Look(status.st_size, status.st_mtime_ns)


def _read(path: Path) -> dict[str, Looks] | None:
    if not path.exists():
        return None
    try:
        return {
            digest: {name: Look(**look) for name, look in looks.items()} for digest, looks in read_json(path).items()
        }
    except (UserError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is no seal: {error}; run the prepare stage again") from error
