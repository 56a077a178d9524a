"""A segmenter of a plain kind: a timm backbone, and a linear layer from tokens to the classes of their pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.tasks.segmentation.settings import SegmenterSettings
from maskllm4v.tasks.shared.tokens import TokenModel, build_backbone
from maskllm4v.utils.rng import torch_seed


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


def build_segmenter(settings: SegmenterSettings, seed: int, *, pretrained: bool = False) -> Segmenter:
    """In evaluation mode; the head's weights are drawn from the seed, too."""
    backbone = build_backbone(settings, seed, pretrained=pretrained)
    assert settings.stride is not None  # settings ask for it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "head"))
        model = Segmenter(backbone, settings.classes, settings.stride)
    model.eval()
    return model
