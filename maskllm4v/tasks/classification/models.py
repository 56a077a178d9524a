"""Dense models by name, from timm."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

import timm
import torch
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import nn

from maskllm4v.tasks.classification.settings import CLASSES, PLAIN_VIT, TimmSettings
from maskllm4v.utils.errors import CheckpointError, ConfigError
from maskllm4v.utils.rng import torch_seed


def build_model(settings: TimmSettings, seed: int, *, pretrained: bool) -> nn.Module:
    """A timm model in evaluation mode.

    Args:
        settings: its name, arguments and attention.
        seed: of the initial weights.
        pretrained: fetch timm's weights (needs a network or a filled cache).

    Raises:
        ConfigError: timm knows no such model, or not these arguments.
        CheckpointError: the pretrained weights cannot be had.
    """
    _check_name(settings)
    if settings.name in CLASSES and pretrained:
        raise ConfigError(f"model.name is {settings.name!r}, which has no pretrained weights; name a timm model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "weights"))
        try:
            model = _create(settings, pretrained)
        except ConfigError:
            raise
        except (ArithmeticError, AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            if pretrained and isinstance(error, OSError | RuntimeError):
                raise CheckpointError(f"no pretrained weights for {settings.name!r}: {said}") from error
            raise ConfigError(f"model.args do not fit {settings.name!r}: {said}") from error
    if not settings.fused_attention:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
    model.eval()
    return model


def image_settings(settings: TimmSettings) -> dict[str, Any]:
    """Size, mean, std, crop and interpolation that a timm model was made for, or that ``model.input`` says.

    Raises:
        ConfigError: timm knows no such model, or mean or std are not a value a channel.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

    config = _config(settings)
    channels, *size = config.get("input_size", (3, 224, 224))
    if wanted := settings.input.img_size or settings.args.get("img_size"):
        size = [wanted, wanted] if isinstance(wanted, int) else list(wanted)
    if settings.args.get("in_chans", channels) != channels:  # grey images: the colours' average statistics
        channels = settings.args["in_chans"]
        for key, standard in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            values = config.get(key, standard)
            config[key] = (sum(values) / len(values),) * channels
    config["input_size"] = (channels, *size)
    overruled = settings.input.model_dump(exclude_none=True, exclude={"img_size"})
    for key in ("mean", "std"):
        if len(overruled.get(key, (0,))) not in (1, channels):
            raise ConfigError(
                f"model.input.{key} has {len(overruled[key])} values, but images have {channels} channels"
            )
    resolved: dict[str, Any] = resolve_data_config({**overruled, "in_chans": channels}, pretrained_cfg=config)
    return resolved


def num_classes(settings: TimmSettings) -> int:
    """How many classes a model tells apart."""
    return int(settings.args.get("num_classes", _config(settings).get("num_classes", 1000)))


def _check_name(settings: TimmSettings) -> None:
    if settings.name not in CLASSES and not timm.is_model(settings.name):
        close = difflib.get_close_matches(settings.name.split(".")[0], timm.list_models(), 5)
        raise ConfigError(
            f"model.name is {settings.name!r}, which timm does not know; close: {', '.join(close) or 'none'}"
        )


def _config(settings: TimmSettings) -> dict[str, Any]:
    """What timm says of a model; nothing of a class that is built from its arguments."""
    _check_name(settings)
    try:
        config = None if settings.name in CLASSES else timm.get_pretrained_cfg(settings.name)
    except RuntimeError as error:
        raise ConfigError(f"model.name is {settings.name!r}, which timm does not know: {error}") from error
    return {} if config is None else dict(config.to_dict())


def _create(settings: TimmSettings, pretrained: bool) -> nn.Module:
    if settings.name == PLAIN_VIT:
        return timm.models.VisionTransformer(**settings.args, **_stem(settings))
    if settings.name == "Eva":
        return _eva(settings)
    if settings.stem is not None:
        raise ConfigError(f"model.stem is for {' and '.join(CLASSES)} only, not for {settings.name!r}")
    model: nn.Module = timm.create_model(settings.name, pretrained=pretrained, **settings.args)
    return model


def _eva(settings: TimmSettings) -> nn.Module:
    """timm's class behind EVA-02 and DINOv3: rotary positions if ``args`` ask for them."""
    args = settings.args
    model = timm.models.Eva(**args)
    if settings.stem is not None:  # the class takes no embedding of another kind; positions stay those of the grid
        grid, embed = model.patch_embed.grid_size, _stem(settings)["embed_layer"]
        size, channels, width = args.get("img_size", 224), args.get("in_chans", 3), args.get("embed_dim", 768)
        model.patch_embed = embed(img_size=size, patch_size=1, in_chans=channels, embed_dim=width)
        if model.patch_embed.grid_size != grid:
            raise ConfigError(f"model.stem gives {model.patch_embed.grid_size} tokens, but args say {grid}")
    return model


def _stem(settings: TimmSettings) -> dict[str, Any]:
    """Convolutions as the patch embedding: timm's ``ConvStem`` in its ``HybridEmbed``, without a projection."""
    if settings.stem is None:
        return {}
    channels, strides = tuple(settings.stem.channels), tuple(settings.stem.strides)
    backbone = ConvStem(settings.args.get("in_chans", 3), depth=len(channels), channels=channels, stride=strides)
    return {"embed_layer": partial(HybridEmbed, backbone=backbone, proj=False), "patch_size": 1}
