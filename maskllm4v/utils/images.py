"""Pictures as PNG files whose bytes depend on the pixels alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import replacing
from maskllm4v.utils.text import one_line

COMPRESSION = 9  # zlib's level; Pillow's own default may change


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write pixels, uint8 ``[H, W, 3]`` or grey ``[H, W]``, without any metadata.

    Raises:
        ValueError: pixels of another shape or type; a float would be cut to an integer in silence.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(f"{path}: a picture is uint8 [H, W] or [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=COMPRESSION)


def read_picture(path: Path) -> np.ndarray:
    """The pixels of a PNG, uint8 ``[H, W, 3]``, grey ones too.

    Raises:
        UserError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise whatever they like
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
