"""A folded ViT and folded layers, as they are converted for a GPU."""

from __future__ import annotations

import torch
from timm.models import VisionTransformer
from torch import nn

import maskllm4v


def pruned(out: int, width: int, pattern: str = "2:4") -> nn.Linear:
    """A layer ``width -> out`` under its magnitude mask."""
    layer = nn.Linear(width, out)
    layer.weight.data *= maskllm4v.NMPattern(pattern).topn_mask(layer.weight.detach().abs())
    return layer


def small_vit(pattern: str = "2:4") -> nn.Module:
    """Width 128, two blocks, 10 classes, 8x8 patches of 112 pixels: 197 tokens; folded but for its head."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=112, patch_size=8, embed_dim=128, depth=2, num_heads=4, num_classes=10)
    maskllm4v.prune(model, "magnitude", pattern=pattern, exclude=["head"])
    return maskllm4v.fold_(model).eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
