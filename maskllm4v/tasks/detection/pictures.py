"""Images with boxes drawn on them, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from maskllm4v.data.annotated import NONE
from maskllm4v.tasks.shared.pictures import SCALE, SMALL, colours, tiled

Boxes = tuple[np.ndarray, np.ndarray]  # [N, K, 4] by corners in pixels, [N, K]


def drawings(images: np.ndarray, truth: Boxes, found: Boxes, names: Sequence[str]) -> np.ndarray:
    """A column per image: the image, the true boxes on it, those found on it, in their classes' colours.

    Args:
        images: uint8 ``[N, C, H, W]``.
        truth, found: boxes and classes; :data:`NONE` is not drawn.
        names: of the classes, written into their boxes.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    coloured = np.broadcast_to(images.transpose(0, 2, 3, 1), (*images.shape[:1], *images.shape[2:], 3))
    scale = SCALE if images.shape[2] <= SMALL else 1
    big = coloured.repeat(scale, 1).repeat(scale, 2)
    return tiled([big, *(_drawn(big, boxes, scale, names) for boxes in (truth, found))], scale=1)


def _drawn(images: np.ndarray, annotated: Boxes, scale: int, names: Sequence[str]) -> np.ndarray:
    drawn, palette = [], colours(len(names))
    for image, boxes, classes in zip(images, *annotated, strict=True):
        canvas = Image.fromarray(np.ascontiguousarray(image))
        draw = ImageDraw.Draw(canvas)
        for box, number in zip(boxes[classes != NONE], classes[classes != NONE], strict=True):
            left, top, right, bottom = (float(value) * scale for value in box)
            if right > left + 1 and bottom > top + 1:
                colour = tuple(map(int, palette[number]))
                draw.rectangle((left, top, right - 1, bottom - 1), outline=colour)
                draw.text((left + 2, top), names[number], fill=colour)
        drawn.append(np.asarray(canvas))
    return np.stack(drawn)
