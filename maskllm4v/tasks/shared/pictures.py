"""Pictures of images and what is known of them, for people to look at."""

from __future__ import annotations

import colorsys

import numpy as np

GAP = 2  # pixels between pictures
GOLDEN = 0.618034  # of the circle of hues, from one colour to the next; five of these are close to a whole turn
GREY = 128
SCALE = 3  # a pixel of an image is so many in the picture, for images as small as these
SMALL = 128  # pixels a side up to which images are scaled up


def tiled(rows: list[np.ndarray], scale: int) -> np.ndarray:
    """Rows of pictures ``[N, H, W, 3]`` as one, each pixel ``scale`` wide and high, grey between them."""
    big = [row.repeat(scale, 1).repeat(scale, 2) for row in rows]
    count, height, width, _ = big[0].shape
    whole = np.full((len(big) * (height + GAP) - GAP, count * (width + GAP) - GAP, 3), GREY, np.uint8)
    for y, row in enumerate(big):
        for x, one in enumerate(row):
            whole[y * (height + GAP) :, x * (width + GAP) :][:height, :width] = one
    return whole


def colours(count: int) -> np.ndarray:
    """Hues that differ most between neighbours, and darker ones for every other five; uint8 ``[count, 3]``."""
    tones = [((GOLDEN * i) % 1, 0.85, 0.65 if i // 5 % 2 else 1.0) for i in range(count)]
    return np.array([[round(255 * v) for v in colorsys.hsv_to_rgb(*tone)] for tone in tones], dtype=np.uint8)
