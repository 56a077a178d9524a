"""COCO's numbers, against pycocotools called by hand on exported files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools")

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskllm4v.data.annotated import Objects
from maskllm4v.tasks.detection.precision import average_precision

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes, classes, scores
NAMES = ("cat", "dog", "nothing is", "hen")
SIZES = (32.0, 96.0)  # COCO's
BY_SIZE = ("map_small", "map_medium", "map_large")


def drawn(seed: int, images: int = 12) -> tuple[list[Objects], list[Found]]:
    """Objects of all sizes and what a model finds: nearly all of them, moved a little, some of another class; and more.

    Two images show nothing, one nothing but crowds; scores have many ties.
    """
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(images):
        count = 0 if image in (2, 5) else int(rng.integers(1, 7))
        corners, sides = rng.uniform(0, 200, (count, 2)), np.exp(rng.uniform(2, 5.3, (count, 2)))
        boxes, classes = np.concatenate([corners, corners + sides], 1), rng.choice([0, 1, 3], count, p=[0.6, 0.3, 0.1])
        crowds = np.full(count, image == 7)
        truth.append(Objects(boxes, classes, crowds, np.prod(sides, 1) * 0.7))
        seen = rng.random(count) < 0.9
        moved = boxes[seen] + rng.normal(0, 0.06, (seen.sum(), 4)) * np.tile(sides[seen], 2)
        other = np.where(rng.random(seen.sum()) < 0.15, 1, classes[seen])
        more = rng.uniform(0, 100, (3, 2))
        moved = np.concatenate([moved, np.concatenate([more, more + rng.uniform(5, 100, (3, 2))], 1)])
        other = np.concatenate([other, rng.integers(0, len(NAMES), 3)])
        found.append((moved.astype(np.float32), other, rng.integers(1, 9, len(other)).astype(np.float32) / 8))
    return truth, found


def exported(truth: list[Objects], found: list[Found], folder: Path) -> COCOeval:
    """What pycocotools makes of two JSON files, as COCO's own tools take them."""
    annotations = [
        {
            "id": number + 1,
            "image_id": image,
            "category_id": int(objects.classes[i]) + 1,
            "bbox": [float(v) for v in (*objects.boxes[i, :2], *(objects.boxes[i, 2:] - objects.boxes[i, :2]))],
            "area": float(objects.areas[i]),
            "iscrowd": int(objects.crowds[i]),
        }
        for number, (image, objects, i) in enumerate(
            (image, objects, i) for image, objects in enumerate(truth) for i in range(len(objects.classes))
        )
    ]
    results = [
        {
            "image_id": image,
            "category_id": int(classes[i]) + 1,
            "bbox": [float(left), float(top), float(right) - float(left), float(bottom) - float(top)],
            "score": float(scores[i]),
        }
        for image, (boxes, classes, scores) in enumerate(found)
        for i, (left, top, right, bottom) in enumerate(boxes)
    ]
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)]
    instances = {"images": [{"id": i} for i in range(len(truth))], "categories": categories, "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps({**instances, "info": {}}))
    (folder / "results.json").write_text(json.dumps(results))
    dataset = COCO(str(folder / "instances.json"))
    evaluation = COCOeval(dataset, dataset.loadRes(str(folder / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_the_exported_files(seed: int, tmp_path: Path) -> None:
    truth, found = drawn(seed)
    metrics = average_precision(truth, found, NAMES, SIZES)
    by_hand = exported(truth, found, tmp_path)
    stats = 100 * by_hand.stats
    for place, name in enumerate(("map", "map50", "map75", *BY_SIZE)):
        assert metrics[name] == stats[place], name
    precision = by_hand.eval["precision"][:, :, :, 0, 2]
    for number, name in enumerate(NAMES):
        own = precision[:, :, number]
        if (own > -1).any():
            assert metrics[f"ap/{name}"] == 100 * own.mean()
    assert metrics["ap/cat"] > 20
    assert "ap/nothing is" not in metrics
    counts = {name: sum(int((o.classes[~o.crowds] == n).sum()) for o in truth) for n, name in enumerate(NAMES)}
    there = [name for name in NAMES if counts[name]]
    assert metrics["map_rare"] == metrics[f"ap/{min(there, key=counts.__getitem__)}"]  # one of three, or of two
    of_classes = [value for name, value in metrics.items() if name.startswith("ap/")]
    assert np.mean(of_classes) == pytest.approx(metrics["map"])


def test_sizes_are_roots_of_areas() -> None:
    """Of three squares, the middle one alone is missed."""
    corners = np.array([[0.0, 0, 8, 8], [10, 10, 22, 22], [30, 30, 50, 50]])
    truth = [Objects.of(corners, np.array([0, 0, 0]))]
    found = [(corners[[0, 2]], np.array([0, 0]), np.array([0.9, 0.8]))]
    metrics = average_precision(truth, found, ("a",), (10.0, 15.0))
    assert {name: round(metrics[name], 9) for name in BY_SIZE} == {"map_small": 100, "map_medium": 0, "map_large": 100}
    widened = average_precision(truth, found, ("a",), (13.0, 15.0))
    assert "map_medium" not in widened  # there are none
    assert widened["map_small"] == pytest.approx(100 * 51 / 101)  # half of them: 51 of the 101 points of recall


def test_a_perfect_detector_has_all() -> None:
    """The first object, too, which pycocotools would take for none if its number were 0."""
    truth, _ = drawn(0)
    single = [Objects(o.boxes, o.classes, np.zeros(len(o.classes), bool), o.areas) for o in truth]
    found = [(objects.boxes, objects.classes, np.ones(len(objects.classes))) for objects in single]
    metrics = average_precision(single, found, NAMES, SIZES)
    assert {round(value, 9) for value in metrics.values()} == {100}


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong() -> None:
    box = np.array([[0.0, 0, 50, 50], [100, 100, 120, 120]])
    truth = [Objects(box, np.array([0, 0]), np.array([True, False]), np.array([2500.0, 400.0]))]
    inside = np.array([[10.0, 10, 20, 20]])
    found = [(np.concatenate([inside, box[1:]]), np.array([0, 0]), np.array([0.9, 0.8]))]
    assert average_precision(truth, found, ("a",), SIZES)["map"] == pytest.approx(100)
    alone = [Objects(box[:1], np.array([0]), np.array([True]), np.array([2500.0]))]
    assert average_precision(alone, [(inside, np.array([0]), np.array([0.9]))], ("a",), SIZES) == {}


def test_images_that_nothing_is_in() -> None:
    none = Objects.of(np.zeros((0, 4)), np.zeros(0, np.int64))
    found = (np.array([[0.0, 0, 9, 9]]), np.array([0]), np.array([0.9]))
    nothing = (np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    assert average_precision([none, none], [found, nothing], ("a",), SIZES) == {}
    one = Objects.of(np.array([[0.0, 0, 9, 9]]), np.array([0]))
    assert average_precision([none, one], [nothing, found], ("a",), SIZES)["map"] == pytest.approx(100)
    assert average_precision([none, one], [nothing, nothing], ("a",), SIZES)["map"] == 0
