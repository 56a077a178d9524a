"""Images with classes of pixels laid over them, for people to look at."""

from __future__ import annotations

import numpy as np

from maskllm4v.data.annotated import IGNORED
from maskllm4v.tasks.shared.pictures import SCALE, SMALL, colours, tiled

OPACITY = 0.6  # of a class's colour


def overlays(images: np.ndarray, masks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """A column per image: the image, the true classes over it, the found ones over it; uint8 ``[H, W, 3]``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        masks, found: classes ``[N, H, W]``; 0, the ground, and :data:`IGNORED` leave the image as it is.
    """
    coloured = np.broadcast_to(images.transpose(0, 2, 3, 1), (*images.shape[:1], *images.shape[2:], 3))
    scale = SCALE if images.shape[2] <= SMALL else 1
    return tiled([coloured, _over(coloured, masks), _over(coloured, found)], scale)


def _over(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    known = np.where(masks == IGNORED, 0, masks)
    painted = colours(int(known.max()) + 1)[known]
    mixed = (OPACITY * painted + (1 - OPACITY) * images).astype(np.uint8)
    return np.where((known > 0)[..., None], mixed, images)
