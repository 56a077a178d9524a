"""Mean intersection over union of classes, borders and rare classes, against loops over pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from maskllm4v.config.metrics import rarest
from maskllm4v.data.annotated import IGNORED
from maskllm4v.tasks.segmentation.scores import SegmentationScores, near_border

CLASSES, REACH = ("ground", "a", "b", "c", "never"), 2
Pixel = tuple[int, int, int]


def drawn(seed: int, images: int = 5, side: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a model and of the dense one, which differ, and masks in patches; a tenth of the pixels is ignored."""
    rng = np.random.default_rng(seed)
    patches = rng.choice(4, (images, side // 4, side // 4), p=[0.55, 0.25, 0.15, 0.05])
    masks = patches.repeat(4, 1).repeat(4, 2)
    masks[rng.random(masks.shape) < 0.1] = IGNORED
    right = np.eye(len(CLASSES))[np.where(masks == IGNORED, 0, masks)].transpose(0, 3, 1, 2)
    logits, dense = (right + rng.normal(0, 0.6, right.shape) for _ in range(2))
    return torch.from_numpy(logits), torch.from_numpy(masks).long(), torch.from_numpy(dense)


def looped(found: np.ndarray, masks: np.ndarray, counted: Callable[[Pixel], bool]) -> dict[str, float]:
    """IoU of each class in percent, from sets of pixels."""
    pixels = [tuple(map(int, place)) for place in np.argwhere(masks != IGNORED)]
    chosen = [place for place in pixels if counted(place)]  # type: ignore[arg-type]
    shares = {}
    for number, name in enumerate(CLASSES):
        truth = {place for place in chosen if masks[place] == number}
        guess = {place for place in chosen if found[place] == number}
        if truth | guess:
            shares[name] = 100 * len(truth & guess) / len(truth | guess)
    return shares


def beside_another(masks: np.ndarray, place: Pixel) -> bool:
    """Whether a pixel of another class lies within reach, ignored ones aside."""
    image, y, x = place
    around = masks[image, max(0, y - REACH) : y + REACH + 1, max(0, x - REACH) : x + REACH + 1]
    return any(value not in (IGNORED, masks[place]) for value in around.flat)


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [[5], [2, 3]])
def test_metrics_are_those_of_loops(seed: int, sizes: list[int]) -> None:
    logits, masks, dense = drawn(seed)
    scores = SegmentationScores(CLASSES, REACH, torch.device("cpu"))
    for part in zip(*(values.split(sizes) for values in (logits, masks, dense)), strict=True):
        scores.add(*part)
    metrics = scores.metrics()
    found, truth = logits.argmax(1).numpy(), masks.numpy()
    of_classes = looped(found, truth, lambda place: True)
    wanted = {f"iou/{name}": value for name, value in of_classes.items()}
    wanted["miou"] = mean(of_classes)
    wanted["miou_border"] = mean(looped(found, truth, lambda place: beside_another(truth, place)))
    wanted["miou_inner"] = mean(looped(found, truth, lambda place: not beside_another(truth, place)))
    counts = {name: int((truth == number).sum()) for number, name in enumerate(CLASSES)}
    fewest = sorted((name for name in CLASSES if counts[name]), key=counts.__getitem__)[:2]  # of four that are there
    wanted["miou_rare"] = mean({name: of_classes[name] for name in fewest})
    known = truth != IGNORED
    wanted["pixel_accuracy"] = 100 * (found == truth)[known].mean()
    wanted["agreement"] = 100 * (found == dense.argmax(1).numpy())[known].mean()
    assert metrics == pytest.approx(wanted, rel=1e-12)
    assert metrics.keys() == wanted.keys()


def test_every_pixel_weighs_the_same() -> None:
    """Not the mean of images' own scores: 1 pixel of 4, and 4 of 4."""
    masks = torch.tensor([[[1, IGNORED], [IGNORED, IGNORED]], [[1, 1], [1, 1]]])
    found = torch.tensor([[[0, 0], [0, 0]], [[1, 1], [1, 1]]])
    scores = SegmentationScores(("ground", "a"), 1, torch.device("cpu"))
    scores.add(torch.nn.functional.one_hot(found, 2).permute(0, 3, 1, 2), masks)
    metrics = scores.metrics()
    assert metrics["iou/a"] == 80
    assert metrics["iou/ground"] == 0
    assert metrics["miou"] == 40
    assert "agreement" not in metrics  # with nothing


def test_a_part_without_pixels_has_no_number() -> None:
    """One class everywhere has no border; a class that is nowhere has no part in the mean."""
    masks = torch.zeros(1, 4, 4, dtype=torch.int64)
    scores = SegmentationScores(("ground", "a"), 1, torch.device("cpu"))
    scores.add(torch.nn.functional.one_hot(masks, 2).permute(0, 3, 1, 2), masks)
    assert scores.metrics() == {
        "miou": 100,
        "pixel_accuracy": 100,
        "miou_inner": 100,
        "miou_rare": 100,
        "iou/ground": 100,
    }


@pytest.mark.parametrize("reach", [1, 3])
def test_borders_reach_as_far_as_said(reach: int) -> None:
    """To both sides of a line between two classes, and not from the image's edge nor from ignored pixels."""
    masks = torch.zeros(1, 9, 12, dtype=torch.int64)
    masks[..., 6:] = 3
    masks[:, 0, 0] = IGNORED
    found = near_border(masks, reach)[0]
    columns = torch.arange(12)
    wanted = ((columns >= 6 - reach) & (columns < 6 + reach)).expand(9, 12)
    assert torch.equal(found | (masks[0] == IGNORED), wanted | (masks[0] == IGNORED))


def test_rare_is_the_third_with_the_fewest() -> None:
    counts = dict(zip("abcdefg", (5, 0, 2, 9, 2, 1, 7), strict=True))
    assert rarest(counts) == ["f", "c"]  # of six that are there; of two with two the first
    assert rarest({"a": 3, "b": 4, "c": 5, "d": 6}) == ["a", "b"]  # rounded up
    assert rarest({"a": 0}) == []


def test_order_of_batches_does_not_matter() -> None:
    logits, masks, _ = drawn(7)
    several = []
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 40):
        scores = SegmentationScores(CLASSES, REACH, torch.device("cpu"))
        for i in order:
            scores.add(logits[i : i + 1], masks[i : i + 1])
        several.append(scores.metrics())
    assert several[0] == several[1] == several[2]
