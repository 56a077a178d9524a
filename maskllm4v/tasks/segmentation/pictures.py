"""Images with classes of pixels laid over them, for people to look at."""

from __future__ import annotations

import colorsys

import numpy as np

from maskllm4v.data.annotated import IGNORED

GAP = 2  # pixels between pictures
GREY = 128
OPACITY = 0.6  # of a class's colour
SCALE = 3  # a pixel of an image is so many in the picture, for images as small as these
SMALL = 128  # pixels a side up to which images are scaled up


def overlays(images: np.ndarray, masks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """A column per image: the image, the true classes over it, the found ones over it; uint8 ``[H, W, 3]``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        masks, found: classes ``[N, H, W]``; 0, the ground, and :data:`IGNORED` leave the image as it is.
    """
    coloured = np.broadcast_to(images.transpose(0, 2, 3, 1), (*images.shape[:1], *images.shape[2:], 3))
    scale = SCALE if images.shape[2] <= SMALL else 1
    return tiled([coloured, _over(coloured, masks), _over(coloured, found)], scale)


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
    """Hues that differ most between neighbours, uint8 ``[count, 3]``."""
    hues = [(0.618034 * i) % 1 for i in range(count)]
    return np.array([[round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.85, 1)] for hue in hues], dtype=np.uint8)


def _over(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    known = np.where(masks == IGNORED, 0, masks)
    painted = colours(int(known.max()) + 1)[known]
    mixed = (OPACITY * painted + (1 - OPACITY) * images).astype(np.uint8)
    return np.where((known > 0)[..., None], mixed, images)
