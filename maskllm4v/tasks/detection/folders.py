"""What images a detector takes, of timm or of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskllm4v.tasks.classification.models import image_settings
from maskllm4v.tasks.detection.settings import LEARNED, DetectorSettings
from maskllm4v.tasks.shared.transformers_folder import load_config, preprocessing
from maskllm4v.utils.errors import ConfigError


def input_settings(settings: DetectorSettings) -> dict[str, Any]:
    """``input_size`` ``(C, H, W)``, ``mean``, ``std``, ``interpolation`` and ``mode`` of a model's images.

    Of a timm model as :func:`~maskllm4v.tasks.classification.models.image_settings` has them; of one of transformers
    from ``preprocessor_config.json`` and, where that says nothing, ImageNet's; ``model.input`` overrules both. For
    YOLOS and DETR a picture keeps its shape (letterbox), for the others it does not (squash), as they were trained.

    Raises:
        ConfigError: nothing says how large images are, or the model takes no images of this size.
    """
    if not settings.of_transformers:
        return image_settings(settings)
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    assert settings.folder is not None
    folder, wanted = Path(settings.folder), settings.input
    config = load_config(settings.name, folder)
    parts = [getattr(config, "backbone_config", None) or config, config]
    channels = next((found for part in parts if (found := getattr(part, "num_channels", None))), 3)
    found = preprocessing(folder)
    size = _pair(wanted.img_size) or found.get("size") or _pair(getattr(parts[0], "image_size", None))
    if size is None:
        raise ConfigError(f"model.input.img_size is needed: {folder} does not say how large images are")
    unit = _pair(getattr(parts[0], "patch_size", None)) or (1, 1)
    if windows := getattr(parts[0], "num_windows", None):
        unit = (unit[0] * windows, unit[1] * windows)
    if size[0] % unit[0] or size[1] % unit[1]:
        raise ConfigError(
            f"model.input.img_size is {list(size)}; {settings.name} in {folder} takes multiples of {list(unit)} pixels"
        )
    told: dict[str, Any] = {"input_size": (channels, *size)}
    for key, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = tuple(getattr(wanted, key) or found.get(key, default))
        if len(values) != channels and getattr(wanted, key) is None:  # grey images: the colours' average statistics
            values = (sum(values) / len(values),) * channels
        if len(values) not in (1, channels):
            raise ConfigError(f"model.input.{key} has {len(values)} values, but images have {channels} channels")
        told[key] = values if len(values) == channels else values * channels
    mode = "letterbox" if settings.name in LEARNED else "squash"
    return told | {"mode": mode, "interpolation": wanted.interpolation or found.get("interpolation", "bilinear")}


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
