"""Average precision as COCO measures it, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from maskllm4v.config.metrics import rarest
from maskllm4v.data.annotated import Objects
from maskllm4v.utils.errors import ConfigError

STATS = ("map", "map50", "map75", "map_small", "map_medium", "map_large")  # the first of pycocotools' summary
UNMEASURED = -1  # what pycocotools gives where there is nothing to find
ENDLESS = 1e5  # pixels, which no side of a box reaches: pycocotools' own


def average_precision(
    truth: Sequence[Objects],
    found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    names: Sequence[str],
    sizes: tuple[float, float],
) -> dict[str, float]:
    """COCO's numbers in percent, without those that nothing in the images belongs to.

    ``map``: mean over classes and IoU of .50 to .95; ``map50``, ``map75``: at these alone; ``map_small``,
    ``map_medium``, ``map_large``: of objects of these sizes; ``ap/<class>``; ``map_rare``: mean over the third of the
    classes that have the fewest objects.

    Args:
        truth: the objects of each image; what is found in a crowd is neither right nor wrong.
        found: boxes ``[m, 4]``, classes ``[m]`` and scores ``[m]`` of each image; ties keep the order of images.
        names: of the classes.
        sizes: in pixels, up to which root of its area an object is small, and medium.

    Raises:
        ConfigError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ConfigError("average precision needs pycocotools: pip install 'maskllm4v[detection]'") from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        dataset = COCO()
        dataset.dataset = {
            "images": [{"id": image} for image in range(len(truth))],
            "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
            "annotations": _truth(truth),
        }
        dataset.createIndex()
        detections = COCO()
        detections.dataset = {**dataset.dataset, "annotations": _found(found)}
        detections.createIndex()
        evaluation = COCOeval(dataset, detections, "bbox")
        ends = [0, *sizes, ENDLESS]
        evaluation.params.areaRng = [[0, ENDLESS**2], *([low**2, high**2] for low, high in pairwise(ends))]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = zip(STATS, evaluation.stats, strict=False)
    metrics = {name: 100 * float(value) for name, value in stats if value > UNMEASURED}
    precision = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, class]; of all sizes, with all detections
    of_classes = {}
    for number, name in enumerate(names):
        if (values := precision[..., number])[values > UNMEASURED].size:
            of_classes[name] = 100 * float(values.mean())
    single = [objects.classes[~objects.crowds] for objects in truth]
    counts = np.bincount(np.concatenate([np.empty(0, np.int64), *single]), minlength=len(names))
    if rare := [of_classes[name] for name in rarest(dict(zip(names, counts.tolist(), strict=True)))]:
        metrics["map_rare"] = sum(rare) / len(rare)
    return metrics | {f"ap/{name}": value for name, value in of_classes.items()}


def _truth(images: Sequence[Objects]) -> list[dict[str, Any]]:
    """pycocotools' records of what there is."""
    listed = _records([(objects.boxes, objects.classes) for objects in images])
    facts = ((crowd, area) for objects in images for crowd, area in zip(objects.crowds, objects.areas, strict=True))
    for record, (crowd, area) in zip(listed, facts, strict=True):
        record |= {"iscrowd": int(crowd), "area": float(area)}
    return listed


def _found(images: Sequence[tuple[np.ndarray, ...]]) -> list[dict[str, Any]]:
    """pycocotools' records of detections."""
    listed = _records([(boxes, classes) for boxes, classes, _ in images])
    for record, score in zip(listed, (score for *_, scores in images for score in scores), strict=True):
        record |= {"iscrowd": 0, "area": record["bbox"][2] * record["bbox"][3], "score": float(score)}
    return listed


def _records(images: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """Numbers begin at 1, since pycocotools takes an annotation 0 for none."""
    listed: list[dict[str, Any]] = []
    for image, (boxes, classes) in enumerate(images):
        for (left, top, right, bottom), number in zip(np.asarray(boxes, np.float64).tolist(), classes, strict=True):
            record = {"id": len(listed) + 1, "image_id": image, "category_id": int(number)}
            listed.append(record | {"bbox": [left, top, right - left, bottom - top]})
    return listed
