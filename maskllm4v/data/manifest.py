"""The manifest of a data source: which images, which classes, which ones calibrate."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.errors import DataError, UserError
from maskllm4v.files import file_digest, read_json, write_csv, write_json
from maskllm4v.randomness import generator

HEADER = ("path", "label", "bytes", "sha256")


@dataclass(frozen=True)
class Entry:
    """One image: its path (or index) in the source, its class, its size, its digest ("" if not hashed)."""

    path: str
    label: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` and its CSV files say.

    Attributes:
        name, source: as in the settings.
        classes: their names, in the order of the labels.
        splits: the entries of ``"train"`` and ``"test"``.
        calibration: indices into the training split.
        extra: what the source itself needs, e.g. its root and normalisation.
        digest: SHA-256 of ``manifest.json``, which holds the CSV files' digests.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Entry]]
    calibration: np.ndarray
    extra: Mapping[str, Any]
    digest: str

    def labels(self, split: str) -> np.ndarray:
        return np.array([entry.label for entry in self.splits[split]], dtype=np.int64)


def choose_calibration(count: int, available: int, seed: int) -> list[int]:
    """Sorted indices of the calibration subset, drawn from the training split without repetition."""
    if count > available:
        raise DataError(f"data.calibration is {count}, but the training split has {available} images")
    return sorted(int(i) for i in generator(seed, "calibration").permutation(available)[:count])


def write_manifest(
    folder: Path,
    *,
    name: str,
    source: str,
    classes: Sequence[str],
    splits: Mapping[str, Sequence[Entry]],
    calibration: Sequence[int],
    extra: Mapping[str, Any],
) -> Manifest:
    """Write a manifest and read it back."""
    described = {}
    for split, entries in splits.items():
        path = folder / f"{split}.csv"
        write_csv(path, HEADER, ((e.path, e.label, e.bytes, e.sha256) for e in entries))
        described[split] = {"images": len(entries), "sha256": file_digest(path)}
    write_json(
        folder / "manifest.json",
        {
            "name": name,
            "source": source,
            "classes": list(classes),
            "splits": described,
            "calibration": list(calibration),
            "extra": dict(extra),
        },
    )
    return read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and verify its CSV files.

    Raises:
        DataError: something is missing or damaged.
    """
    path = folder / "manifest.json"
    try:
        about = read_json(path)
        splits = {split: _read_entries(folder / f"{split}.csv", facts) for split, facts in about["splits"].items()}
        return Manifest(
            name=about["name"],
            source=about["source"],
            classes=tuple(about["classes"]),
            splits=splits,
            calibration=np.array(about["calibration"], dtype=np.int64),
            extra=about["extra"],
            digest=file_digest(path),
        )
    except DataError:
        raise
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no manifest: {error}; run the prepare stage again") from error


def _read_entries(path: Path, facts: Mapping[str, Any]) -> list[Entry]:
    if not path.exists() or file_digest(path) != facts["sha256"]:
        raise DataError(f"{path} is missing or is not the one its manifest describes; run the prepare stage again")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = csv.reader(stream)
        next(rows)
        return [Entry(name, int(label), int(size), digest) for name, label, size, digest in rows]
