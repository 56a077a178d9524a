"""Segmenters with queries: segments, matching and losses, against plain loops in float64 and transformers' own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskllm4v.data.annotated import IGNORED, AnnotatedBatch
from maskllm4v.tasks.segmentation.queries import QueryFamily, match, segments

CLASSES, QUERIES, SIDE = 5, 4, 4  # pixels a side of the models' masks; those of the truth are twice as fine
FAMILY = QueryFamily()


def batch(seed: int = 0, images: int = 3) -> AnnotatedBatch:
    """Masks of up to three classes; the first has ignored pixels, the last nothing else."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 3, (images, 2, 2)) + random.integers(0, CLASSES - 2, (images, 1, 1))
    masks = np.kron(coarse, np.ones((1, SIDE, SIDE), int))
    masks[0, :3, 1:6] = IGNORED
    masks[-1] = IGNORED
    return annotated(torch.from_numpy(masks))


def annotated(masks: Tensor) -> AnnotatedBatch:
    count, sizes = len(masks), torch.tensor(masks.shape[1:]).repeat(len(masks), 1)
    fields: dict[str, Any] = {
        "images": torch.zeros(count, 1, *masks.shape[1:]),
        "masks": masks,
        "boxes": torch.zeros(count, 0, 4),
        "classes": torch.zeros(count, 0, dtype=torch.int64),
        "valid": sizes,
        "sizes": sizes,
        "truth": masks,
    }
    return AnnotatedBatch(**{name: fields[name] for name in AnnotatedBatch._fields})


def outputs(images: int = 3, scale: float = 2.0, **how: Any) -> dict[str, Tensor]:
    classes = scale * torch.randn(images, QUERIES, CLASSES + 1)
    masks = scale * torch.randn(images, QUERIES, SIDE, SIDE)
    found = {"class_queries_logits": classes, "masks_queries_logits": masks}
    return {name: tensor.to(**how) for name, tensor in found.items()}


def part(found: Any, chosen: slice) -> Any:
    if isinstance(found, dict):
        return {name: tensor[chosen] for name, tensor in found.items()}
    return type(found)(*(tensor[chosen] for tensor in found))


# Plain loops


def softmax(logits: np.ndarray) -> np.ndarray:
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    return chances / chances.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def shares(truth: np.ndarray) -> tuple[list[int], list[np.ndarray], np.ndarray]:
    """Classes, their masks, and what pixels weigh, from each output pixel's own 2×2 pixels."""
    classes = sorted(set(truth.flatten().tolist()) - {IGNORED})
    masks = [np.zeros((SIDE, SIDE)) for _ in classes]
    valid = np.zeros((SIDE, SIDE))
    for y, x in itertools.product(range(SIDE), repeat=2):
        inside = truth[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten().tolist()
        known = [value for value in inside if value != IGNORED]
        valid[y, x] = len(known) / 4
        for mask, value in zip(masks, classes, strict=True):
            mask[y, x] = known.count(value) / len(known) if known else 0
    return classes, masks, valid


def mask_cost(logits: np.ndarray, target: np.ndarray, valid: np.ndarray) -> float:
    """5·BCE + 5·Dice (Cheng et al. 2022, Eq. 3), of the pixels that have a class."""
    chance = sigmoid(logits)
    entropy = -(target * np.log(chance) + (1 - target) * np.log(1 - chance))
    overlap = (valid * chance * target).sum()
    dice = 1 - (2 * overlap + 1) / ((valid * chance).sum() + (valid * target).sum() + 1)
    return float(5 * (valid * entropy).sum() / valid.sum() + 5 * dice)


def expected(found: dict[str, Tensor], masks: Tensor) -> float:
    """The loss, the cheapest of all assignments being looked for one after the other."""
    total = 0.0
    for i in range(len(masks)):
        classes, logits = (found[name][i].double().numpy() for name in FAMILY.outputs)
        names, targets, valid = shares(masks[i].numpy())
        chances = softmax(classes)

        def costs(query: int, segment: int, of: Any = (names, targets, valid, chances, logits)) -> float:
            names, targets, valid, chances, logits = of
            return -2 * chances[query, names[segment]] + mask_cost(logits[query], targets[segment], valid)

        every = itertools.permutations(range(QUERIES), len(names))
        best = min(every, key=lambda queries: sum(costs(q, s) for s, q in enumerate(queries)))
        for query in range(QUERIES):
            segment = best.index(query) if query in best else None
            target, weight = (CLASSES, 0.1) if segment is None else (names[segment], 1.0)
            total -= 2 * weight * math.log(chances[query, target])
            if segment is not None:
                total += mask_cost(logits[query], targets[segment], valid)
    return total


# Segments and matching


def test_segments_are_averages_over_each_pixels_area() -> None:
    for truth in batch().masks:
        names, targets, valid = shares(truth.numpy())
        found = segments(truth, (SIDE, SIDE))
        assert found.classes.tolist() == names
        np.testing.assert_allclose(found.valid.numpy(), valid.flatten(), rtol=1e-6)
        np.testing.assert_allclose(found.masks.numpy(), np.reshape(targets, (len(names), SIDE**2)), rtol=1e-6)


def test_a_segment_smaller_than_an_outputs_pixel_is_one_all_the_same() -> None:
    truth = torch.zeros(8, 8, dtype=torch.int64)
    truth[3, 5] = 2
    found = segments(truth, (SIDE, SIDE))
    assert found.classes.tolist() == [0, 2]
    assert found.masks[1].sum() == 0.25
    assert FAMILY.weight(annotated(truth[None])) == 2


@pytest.mark.parametrize("seed", range(10))
def test_matching_is_the_cheapest_of_all(seed: int) -> None:
    torch.manual_seed(seed)
    found, masks = outputs(), batch(seed).masks
    for i, truth in enumerate(masks):
        part_of = segments(truth, (SIDE, SIDE))
        classes, logits = (found[name][i] for name in FAMILY.outputs)
        queries, matched = match(classes, logits.flatten(1), part_of)
        names, targets, valid = shares(truth.numpy())
        assert sorted(matched.tolist()) == list(range(len(names)))
        assert len(set(queries.tolist())) == len(names)
        chances, wide = softmax(classes.double().numpy()), logits.double().numpy()
        cost = np.array(
            [
                [-2 * chances[q, c] + mask_cost(wide[q], t, valid) for c, t in zip(names, targets, strict=True)]
                for q in range(QUERIES)
            ]
        ).reshape(QUERIES, len(names))
        every = itertools.permutations(range(QUERIES), len(names))
        least = min(sum(cost[q, s] for s, q in enumerate(order)) for order in every)
        assert cost[queries.numpy(), matched.numpy()].sum() == pytest.approx(least, rel=1e-6)


def test_more_segments_than_queries() -> None:
    truth = torch.arange(8).clamp(max=CLASSES - 1).repeat(8, 1)
    found = part(outputs(), slice(1))
    queries, matched = match(*(found[name][0].flatten(1) for name in FAMILY.outputs), segments(truth, (SIDE, SIDE)))
    assert len(queries) == len(matched) == QUERIES < CLASSES
    assert FAMILY.loss(found, annotated(truth[None])).isfinite()


# Losses


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_that_of_plain_loops(seed: int) -> None:
    torch.manual_seed(seed)
    found, data = outputs(), batch(seed)
    assert float(FAMILY.loss(found, data)) == pytest.approx(expected(found, data.masks), rel=1e-5)


def test_masks_cost_what_transformers_says() -> None:
    """Its losses of pairs, at points that are all pixels."""
    mask2former = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    data, found = batch(images=2), outputs(2)  # the second has nothing
    data = annotated(data.masks[:1].clamp(max=CLASSES - 1))
    part_of = segments(data.masks[0], (SIDE, SIDE))
    classes, logits = (found[name][0].flatten(1) for name in FAMILY.outputs)
    queries, matched = match(classes, logits, part_of)
    pairs = (logits[queries], part_of.masks[matched], len(queries))
    entropy, dice = mask2former.sigmoid_cross_entropy_loss(*pairs), mask2former.dice_loss(*pairs)
    target = torch.full((QUERIES,), CLASSES)
    target[queries] = part_of.classes[matched]
    weights = torch.ones(CLASSES + 1)
    weights[CLASSES] = 0.1
    of_classes = torch.nn.functional.cross_entropy(classes, target, weights, reduction="sum")
    torch.testing.assert_close(
        FAMILY.loss(part(found, slice(1)), data), 2 * of_classes + len(queries) * (5 * entropy + 5 * dice)
    )


def test_sums_do_not_depend_on_the_split() -> None:
    found, teacher, data = outputs(), outputs(), batch()
    for first, rest in ((slice(1), slice(1, 3)), (slice(2), slice(2, 3))):
        for whole, parts in (
            (FAMILY.loss(found, data), [FAMILY.loss(part(found, s), part(data, s)) for s in (first, rest)]),
            (
                FAMILY.distillation_loss(found, teacher, 2.0, data),
                [FAMILY.distillation_loss(part(found, s), part(teacher, s), 2.0, part(data, s)) for s in (first, rest)],
            ),
            (FAMILY.weight(data), [FAMILY.weight(part(data, s)) for s in (first, rest)]),
        ):
            torch.testing.assert_close(whole, sum(parts))


def test_the_weight_is_the_number_of_segments() -> None:
    data = batch()
    assert FAMILY.weight(data) == sum(len(set(mask.flatten().tolist()) - {IGNORED}) for mask in data.masks)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_that_of_plain_loops(temperature: float) -> None:
    found, teacher, data = outputs(), outputs(), batch()
    total = 0.0
    for i, truth in enumerate(data.masks):
        (classes, masks), (own, dense) = (
            [one[name][i].double().numpy() for name in FAMILY.outputs] for one in (found, teacher)
        )
        *_, valid = shares(truth.numpy())
        for q in range(QUERIES):
            something = 1 - softmax(own[q])[-1]
            p, r = softmax(own[q] / temperature), softmax(classes[q] / temperature)
            total += 2 * (something + 0.1 * (1 - something)) * (p * np.log(p / r)).sum()
            if valid.any():
                p, r = sigmoid(dense[q] / temperature), sigmoid(masks[q] / temperature)
                divergence = p * np.log(p / r) + (1 - p) * np.log((1 - p) / (1 - r))
                total += 5 * something * (valid * divergence).sum() / valid.sum()
    loss = FAMILY.distillation_loss(found, teacher, temperature, data)
    assert float(loss) == pytest.approx(temperature**2 * total, rel=1e-5)
    assert float(FAMILY.distillation_loss(found, found, temperature, data)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_are_finite(scale: float) -> None:
    found, teacher, data = outputs(scale=scale), outputs(scale=scale), batch()
    for tensor in found.values():
        tensor.requires_grad_()
    (FAMILY.loss(found, data) + FAMILY.distillation_loss(found, teacher, 2.0, data)).backward()
    assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in found.values())


def test_ignored_pixels_teach_no_mask() -> None:
    found, teacher, data = outputs(), outputs(), batch()
    found["masks_queries_logits"].requires_grad_()
    (FAMILY.loss(found, data) + FAMILY.distillation_loss(found, teacher, 2.0, data)).backward()
    *_, valid = shares(data.masks[0].numpy())
    gradient = found["masks_queries_logits"].grad
    assert not gradient[0][:, torch.from_numpy(valid) == 0].any()
    assert gradient[0][:, torch.from_numpy(valid) > 0].any()
    assert not gradient[-1].any()


def test_what_is_not_finite_is_the_losss_to_tell() -> None:
    found = outputs()
    found["masks_queries_logits"][0, 0] = torch.nan
    assert FAMILY.loss(found, batch()).isnan()


# Logits


def test_logits_are_sums_over_queries() -> None:
    found = outputs()
    classes, masks = (found[name].double().numpy() for name in FAMILY.outputs)
    for size in ((SIDE, SIDE), (8, 12)):
        logits = FAMILY.logits(found, size)
        wide = torch.nn.functional.interpolate(torch.from_numpy(masks), size, mode="bilinear").numpy()
        expected = sum(softmax(classes)[:, q, :CLASSES, None, None] * sigmoid(wide)[:, q, None] for q in range(QUERIES))
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5)


def test_half_precision_is_widened_first() -> None:
    half, data = outputs(dtype=torch.bfloat16), batch()
    wide = {name: tensor.float() for name, tensor in half.items()}
    assert torch.equal(FAMILY.logits(half, (8, 8)), FAMILY.logits(wide, (8, 8)))
    assert torch.equal(FAMILY.loss(half, data), FAMILY.loss(wide, data))
