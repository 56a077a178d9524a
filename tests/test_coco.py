"""Boxes in COCO's JSON: classes, crowds, sizes, average precision, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_files import (
    CATEGORIES,
    COUNTS,
    TRANSFORM,
    coco_settings,
    draw_coco,
    opened,
    picture,
    read_coco_json,
    turn,
    write_coco,
)
from PIL import Image

from maskllm4v.config import JointAugmentationSettings
from maskllm4v.data import open_annotated, prepare
from maskllm4v.data.annotated import NONE
from maskllm4v.tasks.detection.precision import average_precision
from maskllm4v.utils.errors import ConfigError, DataError

SIZES = (32.0, 96.0)  # COCO's


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_coco(tmp_path / "own")


def by_hand(root: Path, split: str) -> list[tuple[str, list[tuple[list[float], int, bool, float]]]]:
    """File and objects of each image, ascending by id, straight from the JSON."""
    raw = read_coco_json(root, split)
    classes = {7: 0, 90: 1}
    listed = []
    for image in sorted(raw["images"], key=lambda one: one["id"]):
        own = [a for a in raw["annotations"] if a["image_id"] == image["id"]]
        objects = [
            ([x, y, x + w, y + h], classes[a["category_id"]], bool(a["iscrowd"]), a["area"])
            for a in own
            for x, y, w, h in [a["bbox"]]
        ]
        listed.append((image["file_name"], objects))
    return listed


def test_classes_are_numbered_in_the_order_of_ids(root: Path, tmp_path: Path) -> None:
    found = prepare(coco_settings(root, hash_files=True), tmp_path / "m")
    assert found.classes == ("cat", "zebra")
    assert found.extra["category_ids"] == [7, 90]
    for split, count in COUNTS.items():
        listed = by_hand(root, split)
        assert [entry.path for entry in found.splits[split]] == [f"{split}/{name}" for name, _ in listed]
        assert len(listed) == count
        for entry, (_, objects) in zip(found.splits[split], listed, strict=True):
            assert entry.label == sum(not crowd for _, _, crowd, _ in objects)
            assert (entry.bytes, len(entry.sha256)) == ((root / entry.path).stat().st_size, 64)


@pytest.mark.parametrize("split", COUNTS)
def test_annotations_are_those_of_the_json(root: Path, tmp_path: Path, split: str) -> None:
    data = opened(coco_settings(root), tmp_path / "m")
    for path in (root / split).iterdir():
        path.unlink()  # no picture is read
    for found, (_, objects) in zip(data.annotations(split), by_hand(root, split), strict=True):
        assert found.boxes.shape == (len(objects), 4)
        assert [tuple(box) for box in found.boxes] == [tuple(box) for box, *_ in objects]
        assert found.classes.tolist() == [number for _, number, _, _ in objects]
        assert found.crowds.tolist() == [crowd for _, _, crowd, _ in objects]
        assert found.areas.tolist() == [area for *_, area in objects]


@pytest.mark.parametrize("mode", ["squash", "letterbox"])
def test_batches_hold_objects_without_crowds(root: Path, tmp_path: Path, mode: str) -> None:
    data = opened(coco_settings(root), tmp_path / "m", mode=mode)
    batch = data.batch("train", np.arange(6), None)
    assert batch.images.shape == (6, 3, 24, 32)
    assert batch.masks.shape == batch.truth.shape == (6, 0, 0)
    full = batch.at_full_size(batch.boxes)
    for i, (name, objects) in enumerate(by_hand(root, "train")):
        own = [(box, number) for box, number, crowd, _ in objects if not crowd]
        count = int((batch.classes[i] != NONE).sum())
        assert count == len(own)
        assert batch.classes[i, :count].tolist() == [number for _, number in own]
        assert np.allclose(full[i, :count], np.array([box for box, _ in own]).reshape(-1, 4), atol=1e-3)
        with Image.open(root / "train" / name) as image:
            assert batch.sizes[i].tolist() == [image.height, image.width]
            ratio = min(24 / image.height, 32 / image.width)
            fitted = [round(image.height * ratio), round(image.width * ratio)]
        assert batch.valid[i].tolist() == ([24, 32] if mode == "squash" else fitted)


def test_hold_out_takes_boxes_along(root: Path, tmp_path: Path) -> None:
    whole = opened(coco_settings(root), tmp_path / "whole")
    parts = opened(coco_settings(root, holdout=3), tmp_path / "parts")
    known = dict(zip([e.path for e in whole.manifest.splits["train"]], whole.annotations("train"), strict=True))
    for split in ("train", "holdout"):
        for entry, found in zip(parts.manifest.splits[split], parts.annotations(split), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(found, known[entry.path], strict=True))
            assert entry.label == (~found.crowds).sum()


def test_truth_found_exactly_has_full_precision(root: Path, tmp_path: Path) -> None:
    """The JSON has an annotation with id 0, which pycocotools takes for none; and crowds, which none has to find."""
    pytest.importorskip("pycocotools")
    data = opened(coco_settings(root), tmp_path / "m")
    assert read_coco_json(root, "train")["annotations"][0]["id"] == 0
    truth = list(data.annotations("train"))
    found = [(t.boxes[~t.crowds], t.classes[~t.crowds], np.ones((~t.crowds).sum())) for t in truth]
    metrics = average_precision(truth, found, data.manifest.classes, SIZES)
    assert {"map", "map50", "map75", "map_small", "ap/cat", "ap/zebra"} <= metrics.keys()
    assert metrics == pytest.approx(dict.fromkeys(metrics, 100))


def test_precision_is_that_of_pycocotools_on_the_json(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data, draw = opened(coco_settings(root), tmp_path / "m"), np.random.default_rng(0)
    truth = list(data.annotations("train"))
    found = []
    for objects in truth:
        boxes = np.repeat(objects.boxes, 2, 0) + draw.normal(0, 1, (2 * len(objects.boxes), 4))
        found.append((boxes, np.repeat(objects.classes, 2), draw.random(len(boxes)).round(1)))
    own = average_precision(truth, found, data.manifest.classes, SIZES)
    raw = read_coco_json(root, "train")
    for annotation in raw["annotations"]:
        annotation["id"] += 1
    (tmp_path / "again.json").write_text(json.dumps(raw))
    listed = [
        {"image_id": image, "category_id": (7, 90)[number], "score": float(score)}
        | {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        for image, detections in zip(sorted(one["id"] for one in raw["images"]), found, strict=True)
        for box, number, score in zip(*detections, strict=True)
    ]
    official = COCO(str(tmp_path / "again.json"))
    evaluation = COCOeval(official, official.loadRes(listed), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert [own["map"], own["map50"], own["map75"], own["map_small"]] == [100 * x for x in evaluation.stats[:4]]
    assert 0 < own["map"] < 90


def test_crowds_only_and_no_objects_work(root: Path, tmp_path: Path) -> None:
    raw = read_coco_json(root, "test")
    last = max(annotation["image_id"] for annotation in raw["annotations"])
    for annotation in raw["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == last)
    write_coco(root, "test", raw)
    data = opened(coco_settings(root), tmp_path / "m")
    kinds = [(len(o.classes), int(o.crowds.sum())) for o in data.annotations("test")]
    assert (0, 0) in kinds
    assert (1, 1) in kinds
    batch = data.batch("test", np.array([i for i, (_, crowds) in enumerate(kinds) if crowds]), None)
    assert batch.classes.numel() == 0
    assert batch.boxes.shape[1:] == (0, 4)


def test_a_class_that_the_test_split_has_not(root: Path, tmp_path: Path) -> None:
    raw = read_coco_json(root, "test")
    for annotation in raw["annotations"]:
        annotation["category_id"] = 90
    write_coco(root, "test", raw)
    data = opened(coco_settings(root), tmp_path / "m")
    assert {number for objects in data.annotations("test") for number in objects.classes.tolist()} == {1}


def test_both_splits_may_lie_in_one_folder(root: Path, tmp_path: Path) -> None:
    for path in (root / "test").iterdir():
        path.rename(root / "train" / f"test_{path.name}")
    raw = read_coco_json(root, "test")
    for image in raw["images"]:
        image["file_name"] = f"test_{image['file_name']}"
    write_coco(root, "test", raw)
    found = prepare(coco_settings(root, test="train"), tmp_path / "m")
    assert [entry.path for entry in found.splits["test"]] == [f"train/test_{i}.png" for i in (2, 1, 0)]


def test_area_and_crowd_need_not_be_given(root: Path, tmp_path: Path) -> None:
    raw = read_coco_json(root, "test")
    for annotation in raw["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    write_coco(root, "test", raw)
    for objects in opened(coco_settings(root), tmp_path / "m").annotations("test"):
        assert not objects.crowds.any()
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        assert np.allclose(objects.areas, sides[:, 0] * sides[:, 1])


def test_turned_picture_goes_with_boxes_of_what_it_shows(root: Path, tmp_path: Path) -> None:
    before = opened(coco_settings(root), tmp_path / "before").batch("test", np.arange(3), None)
    path = root / "test/1.png"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_270).save(path)
    turn(path, 8)
    after = opened(coco_settings(root), tmp_path / "after").batch("test", np.arange(3), None)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    raw = read_coco_json(root, "test")
    for image in raw["images"]:
        if image["file_name"] == "1.png":
            image["width"], image["height"] = image["height"], image["width"]
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] != 990]
    write_coco(root, "test", raw)
    with pytest.raises(DataError, match=r"test/1\.png is turned by EXIF, but image 990 of the JSON is for the picture"):
        prepare(coco_settings(root), tmp_path / "m")


def test_changed_json_is_found(root: Path, tmp_path: Path) -> None:
    settings = coco_settings(root, hash_files=True)
    prepare(settings, tmp_path / "m")
    raw = read_coco_json(root, "train")
    raw["annotations"][0]["bbox"][0] += 1
    write_coco(root, "train", raw)
    with pytest.raises(DataError, match=r"train\.json has changed since it was prepared"):
        open_annotated(tmp_path / "m", settings, JointAugmentationSettings(), TRANSFORM, needs="boxes")


def test_boxes_are_no_masks(root: Path, tmp_path: Path) -> None:
    settings = coco_settings(root)
    prepare(settings, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"data\.source is 'coco', which has no masks; allowed: masks, scenes"):
        open_annotated(tmp_path / "m", settings, JointAugmentationSettings(), TRANSFORM, needs="masks")


def test_boxes_without_area_can_be_dropped(root: Path, tmp_path: Path) -> None:
    """COCO's training split of 2017 has some."""
    change("annotations", "bbox", [1, 1, 0, 5])(root)
    with pytest.warns(UserWarning, match=r"train\.json: 1 boxes without area are left out"):
        found = prepare(coco_settings(root, empty_boxes="drop"), tmp_path / "m")
    raw = read_coco_json(root, "train")
    assert sum(found.labels("train")) == sum(not a["iscrowd"] for a in raw["annotations"]) - 1


def change(key: str, field: str, value: Any, place: int = 3) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        raw = read_coco_json(root, "train")
        raw[key][place][field] = value
        write_coco(root, "train", raw)

    return apply


def without(key: str, field: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        raw = read_coco_json(root, "train")
        del raw[key][0][field]
        write_coco(root, "train", raw)

    return apply


def replaced(content: Any, split: str = "train") -> Callable[[Path], None]:
    return lambda root: write_coco(root, split, content)


def no_objects(root: Path) -> None:
    write_coco(root, "test", {**read_coco_json(root, "test"), "annotations": []})


def other_categories(root: Path) -> None:
    raw = read_coco_json(root, "test")
    write_coco(root, "test", {**raw, "categories": [CATEGORIES[0], {"id": 7, "name": "dog"}]})


def same_pictures(root: Path) -> None:
    raw = read_coco_json(root, "test")
    raw["images"].append({**read_coco_json(root, "train")["images"][1], "id": 1, "file_name": "again.png"})
    write_coco(root, "test", raw)
    Image.fromarray(picture(1)).save(root / "test/again.png")


BOX = r"annotation 3 of 3\.png has the bbox .*, which "
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda root: (root / "train.json").write_text("{"), r"train\.json is no JSON file"),
    "missing JSON": (lambda root: (root / "train.json").unlink(), r"cannot read .*train\.json"),
    "other JSON": (replaced([1, 2]), r"train\.json has no list 'images'; expected: COCO's JSON"),
    "no images": (replaced({"images": []}), r"train\.json: the list 'images' is empty"),
    "unknown image": (
        change("annotations", "image_id", 4),
        r"train\.json: annotation 3 is of image 4, which is",
    ),
    "unknown category": (change("annotations", "category_id", 8), r"train\.json: annotation 3 is of category 8, which"),
    "duplicate annotation": (change("annotations", "id", 2), r"train\.json: duplicate annotation ids: 2$"),
    "duplicate image": (change("images", "id", 990), r"train\.json: duplicate image ids: 990"),
    "duplicate category": (change("categories", "id", 7, 0), r"train\.json: duplicate category ids: 7"),
    "duplicate name": (change("categories", "name", "cat", 0), r"train\.json: duplicate category names: 'cat'"),
    "duplicate file": (change("images", "file_name", "./2.png"), r"train\.json: duplicate file names: '2\.png'"),
    "file elsewhere": (
        change("images", "file_name", "../a.png"),
        r"image 970 has the file_name '\.\./a\.png'; expected",
    ),
    "zero box": (change("annotations", "bbox", [1, 1, 0, 5]), BOX + "has no area; data.empty_boxes: drop leaves such"),
    "negative box": (change("annotations", "bbox", [9, 9, -5, 5]), BOX + "has a negative side"),
    "negative corner": (change("annotations", "bbox", [-9, 1, 15, 5]), BOX + "reaches out of the picture of"),
    "large box": (change("annotations", "bbox", [1, 1, 99, 5]), BOX + "reaches out of the picture of"),
    "NaN": (change("annotations", "bbox", [1, 1, float("nan"), 5]), r"annotation 3 has the bbox \[1, 1, nan, 5\]; e"),
    "infinite": (
        change("annotations", "bbox", [1, 1, float("inf"), 5]),
        r"annotation 3 has the bbox .*; expected",
    ),
    "three numbers": (change("annotations", "bbox", [1, 1, 5]), r"annotation 3 has the bbox \[1, 1, 5\]; expected"),
    "NaN area": (change("annotations", "area", float("nan")), r"annotation 3 has the area nan; expected: a finite"),
    "crowd of 2": (change("annotations", "iscrowd", 2), r"annotation 3 has the iscrowd 2; expected: 0 or 1"),
    "id of text": (change("annotations", "image_id", "970"), r"annotation 3 has the image_id '970'; expected: an inte"),
    "no bbox": (without("annotations", "bbox"), r"annotation 0 has no 'bbox'"),
    "no name": (without("categories", "name"), r"category 90 has no 'name'"),
    "no id": (without("images", "id"), r"image no\. 1 has no 'id'"),
    "other size": (change("images", "width", 999), r"train/3\.png has \d+×\d+ pixels, but image 970 of the JSON 999×"),
    "no picture": (lambda root: (root / "train/3.png").unlink(), r"train/3\.png No such file"),
    "no folder": (lambda root: (root / "train").rename(root / "elsewhere"), r"own/train is no folder"),
    "no objects": (no_objects, r"own: none of the 3 images of the test split has an object"),
    "other categories": (other_categories, r"different categories; they differ in '7: cat' and '7: dog'"),
    "same pictures": (same_pictures, r"1 of 4 test pictures .*test/again\.png is train/1\.png"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faulty_files_are_named(root: Path, tmp_path: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(root)
    with pytest.raises(DataError, match=message):
        prepare(coco_settings(root), tmp_path / "m")
    assert not (tmp_path / "m" / "manifest.json").exists()


def test_training_on_the_test_split_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "copy.json").write_text((root / "train.json").read_text())
    settings = coco_settings(root, test="train", annotations={"train": "train.json", "test": "copy.json"})
    with pytest.raises(DataError, match=r"pictures 'train/5\.png', .* of the test split are in the training split"):
        prepare(settings, tmp_path / "m")
