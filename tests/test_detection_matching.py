"""Set prediction: who is matched with whom, and what it costs, against loops in NumPy that try every assignment."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskllm4v.data.annotated import NONE, AnnotatedBatch
from maskllm4v.tasks.detection.families import family_of
from maskllm4v.tasks.detection.matching import Targets, match, varifocal_loss
from maskllm4v.tasks.detection.settings import DetectionSettings, DetectorSettings

HEIGHT, WIDTH, LABELS = 40, 60, 3
VALID = ((40, 60), (20, 30), (40, 45))  # of three images: without padding, height and width
LEARNED, SELECTED, UNTOLD = "DetrForObjectDetection", "RfDetrForObjectDetection", "RTDetrForObjectDetection"


def family(name: str, **task: Any) -> Any:
    return family_of(DetectionSettings(**task), DetectorSettings(name=name, folder="nowhere", classes=LABELS))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(counts: tuple[int, ...] = (3, 1, 0), seed: int = 0) -> AnnotatedBatch:
    """Images with so many objects each, anywhere in what is not padding."""
    draw = np.random.default_rng(seed)
    boxes = torch.zeros(len(counts), max(counts), 4)
    classes = torch.full((len(counts), max(counts)), NONE)
    for i, count in enumerate(counts):
        for k in range(count):
            (top, bottom), (left, right) = (sorted(draw.choice(side + 1, 2, replace=False)) for side in VALID[i])
            boxes[i, k] = torch.tensor([left, top, right, bottom])
            classes[i, k] = int(draw.integers(LABELS))
    valid = torch.tensor(VALID[: len(counts)])
    images, masks = torch.zeros(len(counts), 1, HEIGHT, WIDTH), torch.zeros(len(counts), 0, 0, dtype=torch.long)
    return AnnotatedBatch(images, masks, boxes, classes, valid, 2 * valid, masks)


def predictions(labels: int, queries: int = 4, *layers: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    return drawn(3, *layers, queries, labels, seed=seed), drawn(3, *layers, queries, 4, seed=seed + 1).sigmoid()


def shares(found: AnnotatedBatch, image: int) -> list[tuple[int, np.ndarray]]:
    """Class and box, centre and sides, of each object of an image."""
    height, width = VALID[image]
    listed = []
    for k in range(found.classes.shape[1]):
        if (number := int(found.classes[image, k])) != NONE:
            left, top, right, bottom = found.boxes[image, k].double().numpy() / [width, height, width, height]
            box = np.array([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
            listed.append((number, box))
    return listed


def overlaps(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """IoU and generalised IoU."""
    corners = [np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]) for box in (one, other)]
    (a, b), areas = corners, [np.prod(box[2:]) for box in (one, other)]
    inner = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    union = sum(areas) - inner
    hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    return inner / union, inner / union - (hull - union) / hull


def box_loss(own: np.ndarray, true: np.ndarray) -> float:
    return float(5 * np.abs(own - true).sum() + 2 * (1 - overlaps(own, true)[1]))


def cheapest(cost: np.ndarray) -> tuple[int, ...]:
    """The query of each object, of all assignments the one that costs least; ``cost``: [Q, n]."""
    queries, objects = cost.shape
    return min(
        itertools.permutations(range(queries), objects), key=lambda chosen: cost[list(chosen), range(objects)].sum()
    )


def assigned(
    logits: np.ndarray, boxes: np.ndarray, objects: list[tuple[int, np.ndarray]], *, softmax: bool
) -> tuple[int, ...]:
    cost = np.zeros((len(logits), len(objects)))
    for q, k in itertools.product(range(len(logits)), range(len(objects))):
        number, true = objects[k]
        if softmax:
            cost[q, k] = -np.exp(logits[q, number]) / np.exp(logits[q]).sum()
        else:
            p = 1 / (1 + np.exp(-logits[q, number]))
            cost[q, k] = 2 * (0.25 * (1 - p) ** 2 * -np.log(p) - 0.75 * p**2 * -np.log(1 - p))
        cost[q, k] += 5 * np.abs(boxes[q] - true).sum() - 2 * overlaps(boxes[q], true)[1]
    return cheapest(cost)


def softmax_loss(logits: np.ndarray, boxes: np.ndarray, objects: list[tuple[int, np.ndarray]]) -> float:
    chosen = assigned(logits, boxes, objects, softmax=True)
    total = sum(box_loss(boxes[q], true) for q, (_, true) in zip(chosen, objects, strict=True))
    for q in range(len(logits)):
        label = objects[chosen.index(q)][0] if q in chosen else LABELS
        entropy = np.log(np.exp(logits[q]).sum()) - logits[q, label]
        total += (0.1 if label == LABELS else 1) * entropy
    return float(total)


def sigmoid_loss(logits: np.ndarray, boxes: np.ndarray, objects: list[tuple[int, np.ndarray]]) -> float:
    chosen = assigned(logits, boxes, objects, softmax=False)
    total = sum(box_loss(boxes[q], true) for q, (_, true) in zip(chosen, objects, strict=True))
    for q, c in itertools.product(range(len(logits)), range(LABELS)):
        p, quality = 1 / (1 + np.exp(-logits[q, c])), 0.0
        if q in chosen and objects[chosen.index(q)][0] == c:
            quality = overlaps(boxes[q], objects[chosen.index(q)][1])[0]
        if quality > 0:
            total += -quality * (quality * np.log(p) + (1 - quality) * np.log(1 - p))
        else:
            total += -0.75 * p**2 * np.log(1 - p)
    return float(total)


def test_no_assignment_is_cheaper() -> None:
    cost = drawn(3, 5, 4).double()
    classes = torch.tensor([[0, 0, 0, 0], [0, 0, NONE, NONE], [NONE] * 4])
    found = match(cost, Targets(classes, torch.zeros(3, 4, 4)))
    for image, count in enumerate((4, 2, 0)):
        pairs = [(int(q), int(k)) for i, q, k in zip(*found, strict=True) if i == image]
        assert sorted(k for _, k in pairs) == list(range(count))
        wanted = cheapest(cost[image, :, :count].numpy())
        assert tuple(q for q, _ in sorted(pairs, key=lambda pair: pair[1])) == wanted


def test_more_objects_than_queries() -> None:
    """Each query gets one, the cheapest way."""
    cost = drawn(1, 2, 4)
    found = match(cost, Targets(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 4)))
    wanted = cheapest(cost[0].T.numpy())
    assert dict(zip(found.query.tolist(), found.object.tolist(), strict=True)) == dict(enumerate(wanted))


def test_values_that_are_not_finite_do_not_stop_the_matching() -> None:
    """The trainer says so of the loss, with the step."""
    cost = torch.tensor([[[float("nan")], [1.0]]])
    found = match(cost, Targets(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 4)))
    assert found.query.tolist() == [1]


@pytest.mark.parametrize("counts", [(3, 1, 0), (0, 0, 0), (4, 4, 2)])
def test_loss_of_learned_queries(counts: tuple[int, ...]) -> None:
    images = batch(counts)
    logits, boxes = predictions(LABELS + 1)
    wanted = sum(
        softmax_loss(logits[i].double().numpy(), boxes[i].double().numpy(), shares(images, i)) for i in range(3)
    )
    own = family(LEARNED)
    assert float(own.loss({"logits": logits, "boxes": boxes}, images)) == pytest.approx(wanted, rel=1e-5)
    assert int(own.weight(images)) == sum(counts)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("counts", [(3, 1, 0), (0, 0, 0)])
def test_loss_of_selected_queries(counts: tuple[int, ...], groups: int) -> None:
    """Every layer and every group of queries finds all objects by itself; groups count as one."""
    images = batch(counts)
    logits, boxes = predictions(LABELS, 4 * groups)
    others = predictions(LABELS, 4 * groups, *(2,), seed=5)
    wanted = 0.0
    for i, group in itertools.product(range(3), range(groups)):
        part, objects = slice(4 * group, 4 * group + 4), shares(images, i)
        sets = [(logits[i, part], boxes[i, part])] + [(others[0][i, k, part], others[1][i, k, part]) for k in range(2)]
        wanted += sum(sigmoid_loss(a.double().numpy(), b.double().numpy(), objects) for a, b in sets)
    outputs = {"logits": logits, "boxes": boxes, "auxiliary_logits": others[0], "auxiliary_boxes": others[1]}
    outputs["tokens"] = torch.zeros(3, groups, 4, dtype=torch.long)
    loss = float(family(SELECTED).loss(outputs, images))
    assert loss == pytest.approx(wanted / groups, rel=1e-5)


def test_gradients_reach_classes_and_boxes_but_not_the_wanted_scores() -> None:
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    target = torch.tensor([0.6, 0.0])
    varifocal_loss(logits, target).backward()  # type: ignore[no-untyped-call]
    p = logits.detach().sigmoid()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([float(0.6 * (p[0] - 0.6)), float(0.75 * p[1] ** 2 * p[1])], rel=1e-5)

    images = batch()
    for name, labels in ((LEARNED, LABELS + 1), (SELECTED, LABELS)):
        found = [tensor.requires_grad_() for tensor in predictions(labels)]
        outputs = {"logits": found[0], "boxes": found[1], "tokens": torch.zeros(3, 1, 4)}
        family(name).loss(outputs, images).backward()
        assert all(bool(tensor.grad.abs().sum() > 0) for tensor in found if tensor.grad is not None)


def test_learned_queries_are_distilled_by_their_numbers() -> None:
    own, images = family(LEARNED), batch()
    outputs, teacher = (
        dict(zip(("logits", "boxes"), predictions(LABELS + 1, seed=seed), strict=True)) for seed in (1, 7)
    )
    wanted = 0.0
    for i, q in itertools.product(range(3), range(4)):
        (ours, theirs), boxes = (
            [f[key][i, q].double().numpy() for f in (outputs, teacher)] for key in ("logits", "boxes")
        )
        p, target = (np.exp(z / 2) / np.exp(z / 2).sum() for z in (ours, theirs))
        sure = 1 - np.exp(theirs[-1]) / np.exp(theirs).sum()
        wanted += 4 * (sure + 0.1 * (1 - sure)) * (target * np.log(target / p)).sum() + sure * box_loss(*boxes)
    assert float(own.distillation_loss(outputs, teacher, 2.0, images)) == pytest.approx(wanted, rel=1e-5)
    assert float(own.distillation_loss(teacher, teacher, 2.0, images)) == pytest.approx(0, abs=1e-5)


def test_selected_queries_are_distilled_by_their_tokens() -> None:
    """The same predictions in another order are the same; of other tokens there is nothing to learn."""
    own, images = family(SELECTED), batch()
    logits, boxes = predictions(LABELS)
    tokens = torch.tensor([[7, 2, 5, 0], [1, 2, 3, 4], [9, 8, 7, 6]])[:, None]
    teacher = {"logits": logits, "boxes": boxes, "tokens": tokens}
    order = torch.tensor([2, 0, 3, 1])
    moved = {"logits": logits[:, order], "boxes": boxes[:, order], "tokens": tokens[..., order]}
    assert float(own.distillation_loss(moved, teacher, 2.0, images)) == pytest.approx(0, abs=1e-5)
    assert own.kept(moved, teacher).tolist() == [12, 12]

    by_number = {**moved, "tokens": tokens}
    assert float(own.distillation_loss(by_number, teacher, 2.0, images)) > 1
    elsewhere = {**moved, "tokens": tokens + 100}
    assert float(own.distillation_loss(elsewhere, teacher, 2.0, images)) == 0
    assert own.kept(elsewhere, teacher).tolist() == [0, 12]

    student = dict(zip(("logits", "boxes"), predictions(LABELS, seed=7), strict=True))
    student["tokens"] = torch.tensor([[5, 40, 41, 42], [4, 3, 50, 51], [60, 61, 62, 63]])[:, None]
    wanted = 0.0
    for i, q, other in ((0, 0, 2), (1, 0, 3), (1, 1, 2)):
        ours, theirs = student["logits"][i, q].double().numpy(), logits[i, other].double().numpy()
        p, target = (1 / (1 + np.exp(-z / 2)) for z in (ours, theirs))
        divergence = target * np.log(target / p) + (1 - target) * np.log((1 - target) / (1 - p))
        pair = student["boxes"][i, q].double().numpy(), boxes[i, other].double().numpy()
        wanted += 4 * divergence.sum() + (1 / (1 + np.exp(-theirs))).max() * box_loss(*pair)
    assert float(own.distillation_loss(student, teacher, 2.0, images)) == pytest.approx(wanted, rel=1e-5)
    assert own.kept(student, teacher).tolist() == [3, 12]


def test_detections_are_in_pixels_of_what_is_not_padding() -> None:
    """And, at full size, of the picture as it is stored."""
    images = batch()
    logits = torch.full((3, 2, LABELS), -9.0)
    logits[:, 1, 2] = 3
    boxes = torch.tensor([0.5, 0.5, 1, 1]).expand(3, 2, 4)
    outputs = {"logits": logits, "boxes": boxes, "tokens": torch.zeros(3, 1, 2)}
    found = family(SELECTED, detections=1).detections(outputs, images)
    assert found.classes.tolist() == [[2]] * 3
    assert found.scores.flatten().tolist() == pytest.approx([float(torch.tensor(3.0).sigmoid())] * 3)
    for i, (height, width) in enumerate(VALID):
        assert found.boxes[i, 0].tolist() == [0, 0, width, height]
        assert images.at_full_size(found.boxes)[i, 0].tolist() == [0, 0, 2 * width, 2 * height]


def test_boxes_are_shares_of_the_padded_picture_for_models_that_are_not_told_of_padding() -> None:
    images = batch()
    outputs = {"logits": torch.zeros(3, 2, LABELS), "boxes": torch.tensor([0.25, 0.5, 0.5, 1]).expand(3, 2, 4)}
    found = family(UNTOLD).detections({**outputs, "tokens": torch.zeros(3, 1, 2)}, images)
    assert (found.boxes == torch.tensor([0, 0, WIDTH / 2, HEIGHT])).all()


def test_a_selected_query_gives_several_detections_and_a_learned_one_its_likeliest() -> None:
    images = batch()
    logits = torch.tensor([[[2.0, 1.0, -4.0], [0.0, -1.0, -2.0]]]).expand(3, -1, -1)
    outputs = {"logits": logits, "boxes": torch.rand(3, 2, 4), "tokens": torch.zeros(3, 1, 2)}
    assert family(SELECTED, detections=3).detections(outputs, images).classes[0].tolist() == [0, 1, 0]

    logits = torch.tensor([[[2.0, 1.0, -4.0, 0.0], [0.0, 1.0, -2.0, 6.0]]]).expand(3, -1, -1)
    found = family(LEARNED, detections=3).detections({"logits": logits, "boxes": torch.rand(3, 2, 4)}, images)
    assert found.classes[0].tolist() == [0, 1]
    assert found.scores[0].tolist() == pytest.approx(logits[0].softmax(-1)[:, :3].amax(-1).tolist())
