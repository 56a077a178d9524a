"""A segmenter of a plain kind: a timm backbone, and a linear layer from tokens to the classes of their pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.tasks.classification.models import build_model
from maskllm4v.tasks.segmentation.settings import SegmenterSettings
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import torch_seed


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


class Segmenter(TokenModel):
    """Logits ``[B, classes, H, W]`` of images ``[B, C, H, W]``.

    Args:
        backbone: see :class:`TokenModel`.
        classes: K.
        stride: pixels a side that a token stands for.
    """

    def __init__(self, backbone: nn.Module, classes: int, stride: int) -> None:
        super().__init__(backbone, classes * stride**2)
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(images), self.stride)


def build_backbone(settings: SegmenterSettings, seed: int, *, pretrained: bool) -> nn.Module:
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


def build_segmenter(settings: SegmenterSettings, seed: int, *, pretrained: bool = False) -> Segmenter:
    """In evaluation mode; the head's weights are drawn from the seed, too."""
    backbone = build_backbone(settings, seed, pretrained=pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "head"))
        model = Segmenter(backbone, settings.classes, settings.stride)
    model.eval()
    return model
