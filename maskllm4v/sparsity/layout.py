"""How parameters hold the rows of their matrices.

N:M groups lie along the inputs, over which a product sums. Masks, scores and statistics see every parameter as rows
``[..., out, in]``, whatever way round it is stored.

The inputs of a convolution's patch come in the order of channels-last memory: position by position, the channels of
each side by side. So groups lie along channels wherever M divides these, as sparse kernels of convolutions want them
(TensorRT: two zeros in four channels, for each output and each position of the kernel). A patch that is cut out of a
channels-last image is in that order as it lies, for those who multiply patches by a matrix. With 3 channels, groups
cross from one pixel to the next: such a weight is sparse for products of matrices alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["rows", "columns", "patches"]
"""``rows``: ``[..., out, in]``, as ``nn.Linear`` stores it. ``columns``: ``[..., in, out]``, as transformers' Conv1D.
``patches``: ``[out, channels, ...]`` of a convolution that multiplies each patch once; its inputs are the patch,
position by position.
"""


def to_rows(weight: Tensor, layout: Layout) -> Tensor:
    """``[..., out, in]`` of a parameter, or of anything of its shape; a view, or of patches perhaps a copy."""
    if layout == "rows":
        return weight
    return weight.transpose(-1, -2) if layout == "columns" else weight.movedim(1, -1).flatten(1)


def from_rows(rows: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """The inverse of :func:`to_rows`, for a parameter of that shape."""
    if layout == "rows":
        return rows
    if layout == "columns":
        return rows.transpose(-1, -2)
    out, channels, *kernel = shape
    # Contiguous, for the outputs of a convolution are laid out as its weight is, and models may rely on that.
    return rows.reshape(out, *kernel, channels).movedim(-1, 1).contiguous()
