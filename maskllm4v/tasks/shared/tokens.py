"""Models of tokens: a timm backbone, and one linear layer on each of its tokens."""

from __future__ import annotations

import math

from torch import Tensor, nn

from maskllm4v.tasks.classification.models import build_model
from maskllm4v.tasks.classification.settings import TimmSettings
from maskllm4v.utils.errors import ConfigError


class TokenModel(nn.Module):
    """A backbone whose every token gets one linear layer: ``[B, C, H, W]`` to ``[B, out, h, w]``.

    Args:
        backbone: a timm model; ``forward_features`` gives ``[B, prefix + h·w, width]``, or a map ``[B, h, w, width]``.
        out: values per token.
    """

    def __init__(self, backbone: nn.Module, out: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(int(backbone.num_features), out)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        found = self.backbone.forward_features(images)  # type: ignore[operator]
        if found.ndim == 3:
            found = found[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
            side = math.isqrt(found.shape[1])
            found = found.unflatten(1, (side, found.shape[1] // side))
        values: Tensor = self.head(found).permute(0, 3, 1, 2)
        return values


def build_backbone(settings: TimmSettings, seed: int, *, pretrained: bool) -> nn.Module:
    """The timm model without its classifier.

    Raises:
        ConfigError: see :func:`maskllm4v.tasks.classification.models.build_model`; or it gives no tokens.
    """
    backbone = build_model(settings, seed, pretrained=pretrained)
    if not hasattr(backbone, "forward_features") or not hasattr(backbone, "num_features"):
        raise ConfigError(f"model.name is {settings.name!r}, which has no forward_features")
    if callable(reset := getattr(backbone, "reset_classifier", None)):
        reset(0)
    return backbone
