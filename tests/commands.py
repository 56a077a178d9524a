"""Commands run in this process, and the folder that they are run in: images, and the weights of a tiny timm model."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from PIL import Image

from maskllm4v.cli.main import main

CLASSES = ("cat", "dog", "owl")
MODEL = ("--model", "test_vit", "--num-classes", "3", "--img-size", "32", "-j", "0")
TRAIN = (*MODEL, "-b", "4", "--steps", "3", "--lr", "0.1", "--log-interval", "1", "--seed", "5")
DENSE = ("--dense-checkpoint", "dense.pt")
KEYS = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def run(*flags: str) -> Done:
    """``python -m maskllm4v`` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["maskllm4v", *flags]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:  # as the interpreter does
            if isinstance(leaving.code, str):
                err.write(f"{leaving.code}\n")
            code = leaving.code if isinstance(leaving.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())


def well(*flags: str) -> Done:
    done = run(*flags)
    assert done.code == 0, done.err
    return done


def measured(*flags: str) -> dict[str, Any]:
    """The JSON object of ``validate``, which is all that it prints."""
    found = json.loads(well("validate", *MODEL, *flags).out)
    assert list(found) == KEYS
    return dict(found)


def make_project(folder: Path) -> Path:
    """Images where ImageNet would lie, and dense weights."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 4)):
        for label, name in enumerate(CLASSES):
            place = folder / "data" / "imagenet" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(80 * label, 80 * label + 90, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.{'png' if number % 2 else 'jpg'}")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model("test_vit", num_classes=3, img_size=32)
        for parameter in model.parameters():  # freshly made biases are all zero
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    torch.save(model.state_dict(), folder / "dense.pt")
    return folder


def made_of(folder: Path) -> set[str]:
    """What lies in a folder, next to what every test starts with and the cache."""
    return {path.name for path in folder.iterdir()} - {"data", "dense.pt", ".cache"}
