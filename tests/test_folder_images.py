"""Images of a folder through what timm says of a model, and palettes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskllm4v.config import DataSettings, ModelSettings
from maskllm4v.data import open_data, prepare
from maskllm4v.models import image_settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, one image each, in both splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / name / "1.png")
    return tmp_path / "images"


def opened(root: Path, model: ModelSettings) -> Any:
    settings = DataSettings(name="pets", source="folder", root=str(root), calibration=2)
    prepare(settings, root.parent / "manifest")
    return open_data(root.parent / "manifest", transform=image_settings(model))


def test_palette_with_transparency_becomes_rgb(root: Path) -> None:
    palette = Image.new("P", (24, 24))
    palette.putdata([number % 2 for number in range(576)])
    palette.putpalette([10, 20, 30, 200, 150, 100])
    palette.save(root / "train" / "cat" / "0.png", transparency=bytes([0, 128]))
    with Image.open(root / "train" / "cat" / "0.png") as image:
        assert (image.mode, image.info["transparency"]) == ("P", bytes([0, 128]))
    data = opened(root, ModelSettings(name="vit_tiny_patch16_224", args={"img_size": 32}))
    assert data.manifest.splits["train"][0].path == "train/cat/0.png"
    found = data.images("train", np.array([0]), None)[0].mean((1, 2)) * 0.5 + 0.5
    assert np.allclose(found.numpy() * 255, [105, 85, 65], atol=2)  # the colours' mean: transparency is ignored


@pytest.mark.parametrize(
    ("args", "shape"),
    [
        ({"img_size": 32}, (3, 32, 32)),
        ({"img_size": [32, 64]}, (3, 32, 64)),
        ({"img_size": 32, "in_chans": 1}, (1, 32, 32)),
        ({"in_chans": 1}, (1, 224, 224)),
    ],
)
def test_images_have_the_shape_that_the_model_takes(args: dict[str, Any], shape: tuple[int, ...], root: Path) -> None:
    data = opened(root, ModelSettings(name="vit_tiny_patch16_224", args=args))
    assert data.images("train", np.arange(2), None).shape == (2, *shape)
    assert data.images("train", np.arange(2), np.random.default_rng(0)).shape == (2, *shape)
