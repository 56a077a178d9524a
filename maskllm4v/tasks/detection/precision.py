"""Average precision as COCO measures it, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskllm4v.utils.errors import ConfigError

STATS = ("map", "map50", "map75")  # the first numbers of pycocotools' summary


def average_precision(
    truth: Sequence[tuple[np.ndarray, np.ndarray]],
    found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    names: Sequence[str],
) -> dict[str, float]:
    """``map`` over IoU of .50 to .95, ``map50``, ``map75`` and ``ap/<class>``, in percent.

    Args:
        truth: boxes ``[n, 4]`` by corners in pixels and classes ``[n]`` of each image.
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
            "annotations": _annotations(truth),
        }
        dataset.createIndex()
        detections = COCO()
        detections.dataset = {**dataset.dataset, "annotations": _annotations(found)}
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


def _annotations(images: Sequence[tuple[np.ndarray, ...]]) -> list[dict[str, Any]]:
    """pycocotools' records; numbers begin at 1, since it takes an annotation 0 for none."""
    listed: list[dict[str, Any]] = []
    for image, (boxes, classes, *scores) in enumerate(images):
        for i, (left, top, right, bottom) in enumerate(np.asarray(boxes, np.float64).tolist()):
            sides = right - left, bottom - top
            record = {"id": len(listed) + 1, "image_id": image, "category_id": int(classes[i]), "iscrowd": 0}
            record |= {"bbox": [left, top, *sides], "area": sides[0] * sides[1]}
            listed.append(record | {"score": float(scores[0][i])} if scores else record)
    return listed
