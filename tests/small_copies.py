"""Photographs to shrink, and how their small copies are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from images import folder_settings
from PIL import Image

from maskllm4v.data import Manifest, prepare
from maskllm4v.data.decoded import decode
from maskllm4v.data.manifest import Entry
from maskllm4v.data.shrink import RECORD, Recipe

ORIENTATION = 0x0112  # of EXIF
SIZE = 64


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours and some detail: noise alone is nothing that JPEG keeps."""
    draw = np.random.default_rng(seed)
    whole = np.zeros((height, width, 3))
    for cells, strength in ((4, 90), (16, 25), (48, 8)):
        noise = draw.uniform(0, 255, size=(cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        whole += (np.asarray(layer) / 255.0 - 0.5) * 2 * strength
    return Image.fromarray((whole + 128).clip(0, 255).astype(np.uint8))


def draw(root: Path) -> Path:
    """Every kind of file, 200×150 pixels unless its name says otherwise."""
    image = photograph(200, 150)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    palette = image.quantize(16)
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "train/cat/a.JPEG": (image, {"format": "JPEG", "quality": 90}),
        "train/cat/b.png": (image, {}),
        "train/cat/c.bmp": (image, {}),
        "train/cat/d.webp": (image, {"quality": 90}),
        "train/cat/cmyk.jpg": (image.convert("CMYK"), {}),
        "train/dog/exif.jpg": (image, {"exif": turned}),
        "train/dog/grey.jpg": (image.convert("L"), {}),
        "train/dog/bits.png": (image.convert("1"), {}),
        "train/dog/palette.png": (palette, {"transparency": bytes([0, 128, *range(14)])}),
        "train/dog/alpha.png": (image.convert("RGBA"), {}),
        "train/dog/grey_alpha.png": (image.convert("LA"), {}),
        "train/dog/png.JPEG": (image, {"format": "PNG"}),  # ImageNet has one of these
        "train/dog/gif.jpg": (palette, {"format": "GIF"}),
        "train/dog/huge.jpg": (photograph(640, 520), {"quality": 95}),  # decoded at half its size
        "train/dog/tall.jpg": (photograph(100, 300), {}),
        "val/cat/equal.jpg": (photograph(SIZE, 90), {}),
        "val/cat/small.jpg": (photograph(40, 100), {"quality": 50, "exif": turned}),
        "val/dog/small.png": (photograph(30, 30), {}),
        "val/dog/z.jpg": (image, {}),
    }
    for name, (content, options) in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(root / name, **options)
    (root / "val" / "dog" / "notes.txt").write_text("no image")
    return root


def recipe(source: Path, output: str = "small", **values: Any) -> Recipe:
    return Recipe(source, source.parent / output, **{"size": SIZE, **values})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def images(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name not in (RECORD, "val/dog/notes.txt")}


def manifest(root: Path) -> Manifest:
    return prepare(folder_settings(root), root.parent / f"{root.name}-manifest")


def decoded(root: Path, name: str, mode: str = "RGB") -> Image.Image:
    """As training reads it."""
    found: Image.Image = decode(lambda _: (root / name, name), Entry(name, 0, 0, ""), mode)
    return found


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
