"""Boxes in COCO's JSON format, checked: nothing of a file is used before all of it makes sense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from maskllm4v.data.annotated import Objects
from maskllm4v.data.folder import few_faults
from maskllm4v.utils.errors import DataError, UserError
from maskllm4v.utils.io import read_json
from maskllm4v.utils.text import few

LARGEST = 2**53  # that a float64 holds exactly
BEYOND = 1.0  # pixels that a box may reach out of its picture, for coordinates are rounded


@dataclass(frozen=True)
class CocoImage:
    """A picture that the file lists: its id, the name of its file, height and width."""

    id: int
    file_name: str
    size: tuple[int, int]


@dataclass(frozen=True)
class CocoFile:
    """What a JSON file says.

    Attributes:
        categories: names by id, ascending; the i-th is class i.
        images: ascending by id, as COCO's own evaluation takes them.
        objects: of each image, in the order of annotations' ids.
        dropped: boxes without area that were left out.
    """

    categories: Mapping[int, str]
    images: tuple[CocoImage, ...]
    objects: tuple[Objects, ...]
    dropped: int


def read_coco(path: Path, empty_boxes: Literal["error", "drop"] = "error") -> CocoFile:
    """Read and check a file.

    Raises:
        DataError: it is missing, no JSON, or what it says does not make sense; the message names ids.
    """
    try:
        raw = read_json(path)
    except UserError as error:
        raise DataError(str(error)) from error
    listed = {key: _records(raw, key, path) for key in ("images", "categories", "annotations")}
    checks = _Checks(path)
    categories = {record["id"]: record["name"] for record in checks.unique(listed["categories"], "category", CATEGORY)}
    checks.no_doubles("category names", categories.values())
    images = [
        CocoImage(record["id"], record["file_name"], (record["height"], record["width"]))
        for record in checks.unique(listed["images"], "image", IMAGE)
    ]
    checks.no_doubles("file names", [str(PurePosixPath(image.file_name)) for image in images])
    for image in images:
        name = PurePosixPath(image.file_name)
        if name.is_absolute() or ".." in name.parts:
            checks.fault(f"image {image.id} has the file_name {image.file_name!r}; expected: a path below its folder")
    checks.finish()
    numbers = {category: number for number, category in enumerate(categories)}
    found, dropped = _objects(
        checks, listed["annotations"], {image.id: image for image in images}, numbers, empty_boxes
    )
    checks.finish()
    return CocoFile(categories, tuple(images), tuple(found[image.id] for image in images), dropped)


def _is_id(value: Any) -> bool:
    return type(value) is int


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # NaN is not


def _is_flag(value: Any) -> bool:
    return value in (0, 1)


def _is_area(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


Fields = Mapping[str, tuple[Callable[[Any], bool], str]]  # what each key has to be
CATEGORY: Fields = {"id": (_is_id, "an integer"), "name": (_is_name, "a name")}
IMAGE: Fields = {
    "id": (_is_id, "an integer"),
    "file_name": (_is_name, "a path"),
    "width": (_is_side, "pixels, 1 or more"),
    "height": (_is_side, "pixels, 1 or more"),
}
ANNOTATION: Fields = {
    "id": (_is_id, "an integer"),
    "image_id": (_is_id, "an integer"),
    "category_id": (_is_id, "an integer"),
    "bbox": (_is_box, "[left, top, width, height] in pixels, finite numbers"),
}
OPTIONAL: Fields = {"iscrowd": (_is_flag, "0 or 1"), "area": (_is_area, "a finite number of pixels")}


class _Checks:
    """Collects what is wrong with a file, so that one message names several faults."""

    def __init__(self, path: Path) -> None:
        self.path, self._faults = path, list[str]()

    def fault(self, text: str) -> None:
        self._faults.append(text)

    def finish(self) -> None:
        """Raise :class:`DataError` if anything is wrong."""
        if self._faults:
            raise DataError(f"{self.path}: {few_faults(self._faults)}")

    def unique(self, records: list[Any], what: str, fields: Fields, optional: Fields | None = None) -> list[Any]:
        """Records whose fields are as they have to be, ascending by id; the others, and ids that are there twice, are
        faults.
        """
        sound = []
        for place, record in enumerate(records):
            if wrong := _wrong_field(record, fields, optional or {}):
                known = isinstance(record, dict) and "id" in record
                self.fault(f"{what} {record['id'] if known else f'no. {place + 1}'} {wrong}")
            else:
                sound.append(record)
        self.no_doubles(f"{what} ids", [record["id"] for record in sound])
        return sorted(sound, key=lambda record: int(record["id"]))

    def no_doubles(self, what: str, values: Iterable[Any]) -> None:
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            self.fault(f"duplicate {what}: {few(twice)}")


def _wrong_field(record: Any, fields: Fields, optional: Fields) -> str:
    """What is wrong with a record; empty if nothing is."""
    if not isinstance(record, dict):
        return f"is {type(record).__name__}, not an object with keys"
    for key, (fits, expected) in {**fields, **{k: v for k, v in optional.items() if k in record}}.items():
        if key not in record:
            return f"has no {key!r}"
        if not fits(record[key]):
            return f"has the {key} {record[key]!r}; expected: {expected}"
    return ""


def _records(raw: Any, key: str, path: Path) -> list[Any]:
    records = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(records, list):
        raise DataError(f"{path} has no list {key!r}; expected: COCO's JSON with images, categories and annotations")
    if not records and key != "annotations":
        raise DataError(f"{path}: the list {key!r} is empty")
    return records


def _objects(
    checks: _Checks,
    records: list[Any],
    images: Mapping[int, CocoImage],
    numbers: Mapping[int, int],
    empty_boxes: Literal["error", "drop"],
) -> tuple[dict[int, Objects], int]:
    """The objects of each image, and how many were left out."""
    rows: dict[int, list[tuple[list[float], int, bool, float]]] = {image: [] for image in images}
    dropped = 0
    for record in checks.unique(records, "annotation", ANNOTATION, OPTIONAL):
        name, image = f"annotation {record['id']}", images.get(record["image_id"])
        if image is None:
            checks.fault(f"{name} is of image {record['image_id']}, which is not listed")
        elif record["category_id"] not in numbers:
            checks.fault(f"{name} is of category {record['category_id']}, which is not listed")
        elif wrong := _wrong_box(record["bbox"], image.size):
            if wrong is EMPTY and empty_boxes == "drop":
                dropped += 1
            else:
                checks.fault(f"{name} of {image.file_name} has the bbox {record['bbox']}, which {wrong}")
        else:
            left, top, width, height = map(float, record["bbox"])
            area, crowd = float(record.get("area", width * height)), bool(record.get("iscrowd", 0))
            corners = [left, top, left + width, top + height]
            rows[image.id].append((corners, numbers[record["category_id"]], crowd, area))
    return {image: _as_arrays(found) for image, found in rows.items()}, dropped


EMPTY = "has no area; data.empty_boxes: drop leaves such boxes out"


def _wrong_box(box: list[float], size: tuple[int, int]) -> str:
    """What is wrong with finite numbers of a box; empty if nothing is."""
    left, top, width, height = box
    if width < 0 or height < 0:
        return "has a negative side"
    if not width or not height:
        return EMPTY
    if min(left, top) < -BEYOND or left + width > size[1] + BEYOND or top + height > size[0] + BEYOND:
        return f"reaches out of the picture of {size[1]}×{size[0]} pixels"
    return ""


def _as_arrays(rows: list[tuple[list[float], int, bool, float]]) -> Objects:
    boxes, classes, crowds, areas = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(crowds, bool),
        np.array(areas, np.float64),
    )
