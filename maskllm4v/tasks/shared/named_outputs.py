"""Models of transformers as other runtimes see them: images in, a few named tensors out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class NamedOutputs(nn.Module):
    """A model of transformers from images ``[B, C, H, W]`` to some of its outputs, and no others.

    Args:
        model: takes ``pixel_values``.
        names: of its outputs, in the order in which they are given.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.model(pixel_values=images)
        return {name: found[name] for name in self.names}
