"""How parameters hold the rows of their matrices.

N:M groups lie along the inputs, over which a product sums. Masks, scores and statistics see every parameter as rows
``[..., out, in]``, whatever way round it is stored.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["rows", "columns", "patches"]
"""``rows``: ``[..., out, in]``, as ``nn.Linear`` stores it. ``columns``: ``[..., in, out]``, as transformers' Conv1D.
``patches``: ``[out, channels, ...]`` of a convolution that multiplies each patch once, whose inputs are the patch.
"""


def to_rows(weight: Tensor, layout: Layout) -> Tensor:
    """``[..., out, in]`` of a parameter, or of anything of its shape; a view."""
    if layout == "rows":
        return weight
    return weight.transpose(-1, -2) if layout == "columns" else weight.flatten(1)


def from_rows(rows: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """The inverse of :func:`to_rows`, for a parameter of that shape; a view."""
    if layout == "rows":
        return rows
    return rows.transpose(-1, -2) if layout == "columns" else rows.reshape(shape)
