"""The manifest of a data source: which images, which classes, which ones calibrate."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from maskllm4v.config import DataSettings
from maskllm4v.data.seals import SAMPLE, Looks, seal, sealed
from maskllm4v.utils.errors import DataError, UserError
from maskllm4v.utils.io import file_digest, read_json, write_csv, write_json
from maskllm4v.utils.rng import generator

HEADER = ("path", "label", "bytes", "sha256")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: its path (or index) in the source, its class, its size, its digest ("" if not hashed)."""

    path: str
    label: int
    bytes: int
    sha256: str


class Entries(Sequence[Entry]):
    """The images of a split as arrays: the million of ImageNet take 0.1 GB, which loader workers share.

    Args:
        rows: path, label, size and digest of each image, as text.
    """

    def __init__(self, rows: Iterable[Sequence[str]]) -> None:
        paths, labels, sizes, digests = tuple(zip(*rows, strict=True)) or ((), (), (), ())
        self._paths = np.array([path.encode() for path in paths], dtype=np.bytes_)
        self._digests = np.array(digests, dtype=np.bytes_)
        self._sizes = np.array([int(size) for size in sizes], dtype=np.int64)
        self.labels = np.array([int(label) for label in labels], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, digest = self._paths[index].decode(), self._digests[index].decode()
        return Entry(path, int(self.labels[index]), int(self._sizes[index]), digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


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
        looks: how some files looked, if its seal says so.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Entry]]
    calibration: Sequence[np.ndarray]
    calibration_split: str
    extra: Mapping[str, Any]
    digest: str
    looks: Looks = field(default_factory=dict)

    def labels(self, split: str) -> np.ndarray:
        """Of a split, int64 ``[count]``."""
        entries = self.splits[split]
        if isinstance(entries, Entries):
            return entries.labels.copy()
        return np.array([entry.label for entry in entries], dtype=np.int64)


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
    files: Path | None = None,
    beside: Sequence[Path] = (),
) -> Manifest:
    """Hold out, choose calibration images, write it all down, seal it, and read it back.

    ``files``: the folder that entries are paths in; how some of them look is sealed, too. Those that are hashed are
    checked whenever they are read. ``beside``: other files whose look is sealed.

    Raises:
        DataError: there are too few images, or not the number of classes that ``settings`` expects.
    """
    if isinstance(settings.classes, int) and settings.classes != len(classes):
        raise DataError(f"data.classes is {settings.classes}, but {settings.name} has {len(classes)} classes")
    splits = hold_out(splits, settings)
    described = {}
    for split, entries in splits.items():
        described[split] = write_entries(folder / f"{split}.csv", entries)
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
    looked_at = [] if files is None or settings.hash_files else [files / e.path for e in spread(splits)]
    seal(folder, file_digest(folder / "manifest.json"), [*looked_at, *beside])
    return read_manifest(folder)


def write_entries(path: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Write a CSV file with a line per entry; returns their number and the file's digest, for the manifest."""
    write_csv(path, HEADER, ((e.path, e.label, e.bytes, e.sha256) for e in entries))
    return {"images": len(entries), "sha256": file_digest(path)}


def spread(splits: Mapping[str, Sequence[Entry]]) -> list[Entry]:
    """Some entries of each split, spread over all of it."""
    return [entry for entries in splits.values() for entry in entries[:: -(-len(entries) // SAMPLE) or 1]]


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and verify its CSV files and its seal.

    Raises:
        DataError: something is missing, damaged or edited.
    """
    path = folder / "manifest.json"
    try:
        about, digest = read_json(path), file_digest(path)
        splits = {split: read_entries(folder / f"{split}.csv", facts) for split, facts in about["splits"].items()}
        return Manifest(
            name=about["name"],
            source=about["source"],
            classes=tuple(about["classes"]),
            splits=splits,
            calibration=[np.array(indices, dtype=np.int64) for indices in about["calibration"]],
            calibration_split=about["calibration_split"],
            extra=about["extra"],
            digest=digest,
            looks=sealed(folder, digest),
        )
    except DataError:
        raise
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no manifest: {error}; run the prepare stage again") from error


def read_entries(path: Path, facts: Mapping[str, Any]) -> Entries:
    """Read what :func:`write_entries` wrote.

    Raises:
        DataError: the file is missing, or has another digest.
    """
    if not path.exists() or file_digest(path) != facts["sha256"]:
        raise DataError(f"{path} is missing or is not the one its manifest describes; run the prepare stage again")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = csv.reader(stream)
        next(rows)
        return Entries(rows)
