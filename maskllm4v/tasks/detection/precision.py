"""Average precision as COCO measures it, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskllm4v.data.annotated import Objects
from maskllm4v.utils.errors import ConfigError

STATS = ("map", "map50", "map75")  # the first numbers of pycocotools' summary


def average_precision(
    truth: Sequence[Objects],
    found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    names: Sequence[str],
) -> dict[str, float]:
    """``map`` over IoU of .50 to .95, ``map50``, ``map75`` and ``ap/<class>``, in percent.

    Args:
        truth: the objects of each image; what is found in a crowd is neither right nor wrong.
        found: boxes ``[m, 4]``, classes ``[m]`` and scores ``[m]`` of each image; ties keep the order of images.
        names: of the classes; those that no image has are left out.

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
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {name: 100 * float(value) for name, value in zip(STATS, evaluation.stats, strict=False)}
    precision = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, class]; of all sizes, with all detections
    for number, name in enumerate(names):
        if (values := precision[..., number])[values > -1].size:
            metrics[f"ap/{name}"] = 100 * float(values.mean())
    return metrics


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
