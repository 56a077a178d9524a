"""Detectors that give a set of boxes: which query belongs to which object (Carion et al. 2020, Section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.data.annotated import NONE
from maskllm4v.tasks.detection.model import BOX, cornered, generalised_iou

# What a class, a distance and an overlap weigh, in costs and in losses.
CLASS, L1, GIOU = 1.0, 5.0, 2.0  # Carion et al. 2020, Section A.4
FOCAL_CLASS = 2.0  # of focal costs: Zhu et al. 2021, Section A.4
ALPHA, GAMMA = 0.25, 2.0  # of focal costs, the same
VARIFOCAL_ALPHA, VARIFOCAL_GAMMA = 0.75, 2.0  # Zhang et al. 2021, Section 4.1; RT-DETR and D-FINE have them, too
HOPELESS = 1e9  # what a query costs whose values are not finite: whoever sums its loss says so


class Targets(NamedTuple):
    """What there is to be found in images.

    Attributes:
        classes: the model's labels, int64 ``[B, K]``; :data:`NONE` from an image's last object on.
        boxes: centre and sides in shares of the image, ``[B, K, 4]``.
    """

    classes: Tensor
    boxes: Tensor


class Matches(NamedTuple):
    """Pairs of a query and an object, M in all images together.

    Attributes:
        image, query, object: where they are, int64 ``[M]`` each.
    """

    image: Tensor
    query: Tensor
    object: Tensor


def softmax_cost(logits: Tensor, classes: Tensor) -> Tensor:
    """-p of each object's class, ``[B, Q, K]`` (Carion et al. 2020, Section 3.1).

    Args:
        logits: ``[B, Q, classes + 1]``; the last one says that there is no object.
        classes: ``[B, K]``; what stands where there is none does not matter.
    """
    return -CLASS * _of_classes(logits.softmax(-1), classes)


def focal_cost(logits: Tensor, classes: Tensor) -> Tensor:
    """What the focal loss would change if a query's score of the class had to be 1, not 0 (Zhu et al. 2021, A.4).

    Args:
        logits: ``[B, Q, classes]``.
        classes: see :func:`softmax_cost`.
    """
    score, small = logits.sigmoid(), 1e-8
    there = ALPHA * (1 - score) ** GAMMA * -(score + small).log()
    absent = (1 - ALPHA) * score**GAMMA * -(1 - score + small).log()
    return FOCAL_CLASS * _of_classes(there - absent, classes)


def box_cost(boxes: Tensor, wanted: Tensor) -> Tensor:
    """5·L1 - 2·GIoU of all pairs, ``[B, Q, K]``, of boxes ``[B, Q, 4]`` and ``[B, K, 4]``."""
    apart = (boxes[:, :, None] - wanted[:, None]).abs().sum(-1)
    overlap = generalised_iou(cornered(boxes)[:, :, None], cornered(wanted)[:, None])
    return L1 * apart - GIOU * overlap


@torch.no_grad()
def match(cost: Tensor, objects: Targets) -> Matches:
    """The pairs that cost least in each image, each query and each object in one at most (Kuhn 1955).

    Where an image has more objects than queries, some objects are in none.

    Args:
        cost: of all pairs, ``[B, Q, K]``.
        objects: which of the K are there.
    """
    from scipy.optimize import linear_sum_assignment

    counts = (objects.classes != NONE).sum(1).tolist()
    # One transfer for all images. NaN would be scipy's error, not one of who trains.
    table = torch.nan_to_num(cost.double(), HOPELESS, HOPELESS, -HOPELESS).cpu().numpy()
    pairs = [linear_sum_assignment(one[:, :count]) for one, count in zip(table, counts, strict=True)]
    image = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(rows) for rows, _ in pairs], dtype=torch.long))
    query, found = (torch.cat([torch.as_tensor(pair[side], dtype=torch.long) for pair in pairs]) for side in (0, 1))
    return Matches(*(part.to(cost.device) for part in (image, query, found)))


def box_loss(boxes: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ of 5·L1 + 2·(1 - GIoU) over pairs of boxes ``[..., 4]``, a scalar; each pair weighted, if weights are given."""
    assert boxes.shape[-1] == wanted.shape[-1] == BOX
    misfit = 1 - generalised_iou(cornered(boxes), cornered(wanted))
    pairs = L1 * (boxes - wanted).abs().sum(-1) + GIOU * misfit
    return (pairs if weight is None else weight * pairs).sum()


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of pairs of boxes ``[..., 4]`` by centre and sides, in [0, 1]."""
    (left, other), small = (cornered(boxes), cornered(others)), torch.finfo(boxes.dtype).tiny
    sides = torch.minimum(left[..., 2:], other[..., 2:]) - torch.maximum(left[..., :2], other[..., :2])
    inner = sides.clamp(min=0).prod(-1)
    union = boxes[..., 2:].clamp(min=0).prod(-1) + others[..., 2:].clamp(min=0).prod(-1) - inner
    return inner / union.clamp(min=small)


def varifocal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Σ over scores, a scalar (Zhang et al. 2021, Eq. 2); weights get no gradient, as in RT-DETR.

    Args:
        logits: of any shape.
        target: the box's IoU where the score's class is there, else 0; of the same shape.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    absent = VARIFOCAL_ALPHA * logits.detach().sigmoid() ** VARIFOCAL_GAMMA
    return (torch.where(target > 0, target, absent) * entropy).sum()


def _of_classes(values: Tensor, classes: Tensor) -> Tensor:
    """Of values ``[B, Q, classes]`` those of each object's class, ``[B, Q, K]``."""
    index = classes.clamp(min=0)[:, None].expand(-1, values.shape[1], -1)
    return values.gather(2, index)
