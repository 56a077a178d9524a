"""The manifest of a data source: which images, which classes, which ones calibrate."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.config import DataSettings
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
        splits: the entries of ``"train"`` and ``"test"``, and of ``"holdout"`` if images were held out.
        calibration: disjoint sets of indices into the split that :attr:`calibration_split` names.
        calibration_split: ``"train"``, or ``"test"`` where calibration leaks on purpose.
        extra: what the source itself needs, e.g. its root and normalisation.
        digest: SHA-256 of ``manifest.json``, which holds the CSV files' digests.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Entry]]
    calibration: Sequence[np.ndarray]
    calibration_split: str
    extra: Mapping[str, Any]
    digest: str

    def labels(self, split: str) -> np.ndarray:
        return np.array([entry.label for entry in self.splits[split]], dtype=np.int64)


def hold_out(splits: Mapping[str, Sequence[Entry]], settings: DataSettings) -> dict[str, Sequence[Entry]]:
    """Move ``settings.holdout`` images from the training split to one of their own, the order kept."""
    if not settings.holdout:
        return dict(splits)
    train = splits["train"]
    if settings.holdout >= len(train):
        raise DataError(f"data.holdout is {settings.holdout}, but the training split has {len(train)} images")
    chosen = set(generator(settings.split_seed, "holdout").permutation(len(train))[: settings.holdout].tolist())
    parts: tuple[list[Entry], list[Entry]] = ([], [])
    for i, entry in enumerate(train):
        parts[i in chosen].append(entry)
    return {**splits, "train": parts[0], "holdout": parts[1]}


def choose_calibration(settings: DataSettings, available: int) -> list[list[int]]:
    """Disjoint sorted sets of indices, drawn from the calibration split without repetition."""
    count, sets = settings.calibration, settings.calibration_sets
    if count * sets > available:
        times = f" times calibration_sets {sets}" if sets > 1 else ""
        raise DataError(
            f"data.calibration is {count}{times}, but the {settings.calibration_split} split has {available} images"
        )
    order = generator(settings.calibration_seed, "calibration").permutation(available)
    return [sorted(int(i) for i in order[k * count : (k + 1) * count]) for k in range(sets)]


def write_manifest(
    folder: Path,
    *,
    settings: DataSettings,
    classes: Sequence[str],
    splits: Mapping[str, Sequence[Entry]],
    extra: Mapping[str, Any],
) -> Manifest:
    """Hold out, choose calibration images, write it all down, and read it back.

    Raises:
        DataError: there are too few images, or not the number of classes that ``settings`` expects.
    """
    if settings.classes not in (None, len(classes)):
        raise DataError(f"data.classes is {settings.classes}, but {settings.name} has {len(classes)} classes")
    splits = hold_out(splits, settings)
    described = {}
    for split, entries in splits.items():
        path = folder / f"{split}.csv"
        write_csv(path, HEADER, ((e.path, e.label, e.bytes, e.sha256) for e in entries))
        described[split] = {"images": len(entries), "sha256": file_digest(path)}
    about = {
        "name": settings.name,
        "source": settings.source,
        "classes": list(classes),
        "splits": described,
        "calibration": choose_calibration(settings, len(splits[settings.calibration_split])),
        "calibration_split": settings.calibration_split,
        "extra": dict(extra),
    }
    write_json(folder / "manifest.json", about)
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
            calibration=[np.array(indices, dtype=np.int64) for indices in about["calibration"]],
            calibration_split=about["calibration_split"],
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
