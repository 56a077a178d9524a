"""Scenes of digits: real digits, none in both splits, that do not touch; the same bytes everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from maskllm4v.config import SceneSettings
from maskllm4v.data.digits import digit_images
from maskllm4v.data.scenes import LEVELS, THRESHOLD, Scene, enlarge, free_places, half_of_digits, make_scene
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.rng import generator

SETTINGS, SEED, COUNT = SceneSettings(), 1234, 40


def scenes(split: str, count: int = COUNT, settings: SceneSettings = SETTINGS) -> list[Scene]:
    images, labels = digit_images()
    own = half_of_digits(labels, split, SEED)
    return [make_scene(images[own], labels[own], generator(SEED, "scene", split, i), settings) for i in range(count)]


def test_halves_of_digits_share_none_and_are_stratified() -> None:
    _, labels = digit_images()
    train, test = (half_of_digits(labels, split, SEED) for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(len(labels)))
    counts = [np.bincount(labels[half], minlength=10) for half in (train, test)]
    assert np.abs(counts[0] - counts[1]).max() <= 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_hold_their_digits_and_nothing_of_others(split: str) -> None:
    for image, mask, boxes, classes in scenes(split):
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((1, 32, 32), np.uint8, (32, 32), np.uint8)
        assert SETTINGS.digits[0] <= len(boxes) == len(classes) <= SETTINGS.digits[1]
        covered = np.zeros((32, 32), int)
        for (left, top, right, bottom), number in zip(boxes, classes, strict=True):
            covered[top:bottom, left:right] += 1
            inside = mask[top:bottom, left:right]
            assert set(inside.flat) - {0} == {1 + number}
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()  # no smaller box would do
        assert covered.max() == 1
        assert not mask[covered == 0].any()


def test_digits_are_real_ones_of_the_half() -> None:
    images, labels = digit_images()
    own = half_of_digits(labels, "train", SEED)
    for _, mask, boxes, classes in scenes("train", 10, SceneSettings(digits=(1, 1), sides=[16])):
        left, top, right, bottom = boxes[0]
        shape = mask[top:bottom, left:right] > 0
        assert any(np.array_equal(shape, _shape(images[i])) for i in own if labels[i] == classes[0])


def _shape(digit: np.ndarray) -> np.ndarray:
    """Where a digit of 16 pixels is drawn, without what is around it."""
    drawn = enlarge(digit, 16) >= THRESHOLD * 32**2
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    return drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_bytes_of_scenes() -> None:
    """Integers alone, so that no CPU and no release of NumPy may change them."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for parts in scenes(split, 5):
            for part in parts:
                digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == "5c16dfc0a4aec77b"


def test_enlarging_interpolates_exactly() -> None:
    """As in float64, between the centres of pixels, the outermost values beyond them."""
    digit = np.random.default_rng(0).integers(0, LEVELS + 1, (8, 8))
    found = enlarge(digit, 12) / 24**2
    places = ((np.arange(12) + 0.5) * 8 / 12 - 0.5).clip(0, 7)
    along = np.stack([np.interp(places, np.arange(8), line) for line in digit])
    wanted = np.stack([np.interp(places, np.arange(8), column) for column in along.T]).T
    assert np.allclose(found, wanted, rtol=0, atol=1e-12)


def test_free_places_are_those_that_cover_nothing_taken() -> None:
    taken = np.random.default_rng(1).random((9, 11)) < 0.15
    found = free_places(taken, 3, 2)
    wanted = [[not taken[y : y + 3, x : x + 2].any() for x in range(10)] for y in range(7)]
    assert np.array_equal(found, wanted)


def test_too_many_digits_are_an_error() -> None:
    crowded = SceneSettings(size=16, sides=[16], digits=(3, 3))
    with pytest.raises(DataError, match=r"3 digits of \[16\] pixels do not fit into a scene of 16 pixels"):
        scenes("train", 1, crowded)
