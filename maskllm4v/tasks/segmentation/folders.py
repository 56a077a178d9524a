"""Segmenters of transformers: what their folders say, compared with the settings, before any image is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.tasks.classification.models import image_settings
from maskllm4v.tasks.segmentation.model import Segmenter
from maskllm4v.tasks.segmentation.settings import SAM, SegmenterSettings
from maskllm4v.tasks.shared import transformers_folder
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import torch_seed

ONE_SIZE = ("EomtForUniversalSegmentation", "EomtDinov3ForUniversalSegmentation", SAM)  # of images, that of the config


class SamBackbone(nn.Module):
    """SAM's image encoder (Kirillov et al. 2023), its neck included, as :class:`Segmenter` takes backbones.

    Args:
        encoder: transformers' ``SamVisionEncoder``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = int(encoder.config.output_channels)  # type: ignore[union-attr, arg-type]

    def forward_features(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, h, w, width]``."""
        found: Tensor = self.encoder(images).last_hidden_state
        return found.permute(0, 2, 3, 1)


def build_from_folder(settings: SegmenterSettings, seed: int, *, pretrained: bool) -> nn.Module:
    """The model in evaluation mode, without heads that serve its training from scratch alone.

    Raises:
        ConfigError: the folder is of another class, or of another number of classes than ``model.classes``; or the
            model would draw random numbers when it is evaluated.
        CheckpointError: see :func:`maskllm4v.tasks.shared.transformers_folder.build`.
    """
    folder = folder_of(settings)
    model: Any = transformers_folder.build(
        settings.name, folder, seed, pretrained=pretrained, fused_attention=settings.fused_attention
    )
    if settings.name == SAM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "head"))
            assert settings.stride is not None
            return Segmenter(SamBackbone(model.vision_encoder), settings.classes, settings.stride).eval()
    if (count := model.config.num_labels) != settings.classes:
        raise ConfigError(
            f"model.classes is {settings.classes}, but {folder / transformers_folder.CONFIG} has {count} (num_labels)"
        )
    if getattr(model, "auxiliary_head", None) is not None:
        model.auxiliary_head = None
    masked = getattr(model, "attn_mask_probs", None)  # EoMT's: 1 hides tokens from queries, 0 does not (annealed)
    if masked is not None and bool(((masked > 0) & (masked < 1)).any()):
        raise ConfigError(f"{folder}: attn_mask_probs is {masked.tolist()}; allowed: 0 and 1, which need no draws")
    return model


def check_names(settings: SegmenterSettings, data: str, names: Sequence[str]) -> None:
    """Compare the names of a model's classes with those of the masks, where both have names (no mere numbers).

    Raises:
        ConfigError: they differ; names the first class that does.
    """
    known = None if not settings.of_transformers or settings.name == SAM else _names(settings)
    if known is None or all(name.isdigit() for name in names):
        return
    for i, (own, other) in enumerate(zip(known, names, strict=True)):
        if own.strip().lower() != other.strip().lower():
            raise ConfigError(f"class {i} is {own!r} in {folder_of(settings)}, but {other!r} in the masks of {data}")


def input_settings(settings: SegmenterSettings) -> dict[str, Any]:
    """``input_size`` ``(C, H, W)``, ``mean``, ``std``, ``interpolation`` and ``mode`` of a model's images.

    Of a timm model as :func:`~maskllm4v.tasks.classification.models.image_settings` has them; of one of transformers
    from ``preprocessor_config.json`` and, where that says nothing, ImageNet's; ``model.input`` overrules both.

    Raises:
        ConfigError: nothing says how large images are, or the model takes no images of this size.
    """
    if not settings.of_transformers:
        told = image_settings(settings)
        if len(set(told["input_size"][1:])) > 1:
            raise ConfigError(f"model.input.img_size is {settings.input.img_size}; allowed for a timm model: a square")
        return told | {"mode": settings.input.mode}
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    folder, wanted = folder_of(settings), settings.input
    config = transformers_folder.load_config(settings.name, folder)
    parts = [getattr(config, key, None) or config for key in ("vision_config", "backbone_config")]
    channels = next((found for part in parts if (found := getattr(part, "num_channels", None))), 3)
    found = transformers_folder.preprocessing(folder)
    own = _pair(getattr(parts[0], "image_size", None))
    fixed = settings.name in ONE_SIZE or getattr(config, "is_hybrid", False)
    size = _pair(wanted.img_size) or (own if fixed else found.get("size")) or own
    if size is None:
        raise ConfigError(f"model.input.img_size is needed: {folder} does not say how large images are")
    if fixed and size != own:
        raise ConfigError(
            f"model.input.img_size is {list(size)}, but {settings.name} in {folder} takes {list(own or ())} alone"
        )
    patch = _pair(getattr(parts[0], "patch_size", None)) or (1, 1)
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ConfigError(f"model.input.img_size is {list(size)}, which patches of {list(patch)} pixels do not divide")
    told = {"input_size": (channels, *size), "mode": wanted.mode}
    for key, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = tuple(getattr(wanted, key) or found.get(key, default))
        if len(values) != channels and getattr(wanted, key) is None:  # grey images: the colours' average statistics
            values = (sum(values) / len(values),) * channels
        if len(values) not in (1, channels):
            raise ConfigError(f"model.input.{key} has {len(values)} values, but images have {channels} channels")
        told[key] = values if len(values) == channels else values * channels
    return told | {"interpolation": wanted.interpolation or found.get("interpolation", "bilinear")}


def folder_of(settings: SegmenterSettings) -> Path:
    """Where the model lies; of transformers' alone."""
    assert settings.folder is not None
    return Path(settings.folder)


def _names(settings: SegmenterSettings) -> tuple[str, ...] | None:
    return transformers_folder.label_names(folder_of(settings))


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
