"""Commands on models, images and files that are not as usual."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import DENSE, MODEL, TRAIN, make_project, well
from timm.models import VisionTransformer
from torch import nn


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with the same images and dense weights."""
    shutil.copytree(project / "data", tmp_path / "data")
    shutil.copy(project / "dense.pt", tmp_path / "dense.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def silent(method: Callable[..., Any]) -> Callable[..., None]:
    def call(self: nn.Module, *args: Any, **how: Any) -> None:
        method(self, *args, **how)

    return call


def test_models_whose_methods_return_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As do those of some of timm's modules that override ``train``."""

    def files(folder: str) -> dict[str, bytes]:
        out = Path(folder)
        made = ("--permutation", "greedy", "--save-model", f"{out}/masks.safetensors")
        well("prune", *MODEL, *DENSE, "--pruner", "wanda", "--nsamples", "8", *made)
        masks = ("--checkpoint", f"{out}/masks.safetensors")
        well("update", *MODEL, *masks, "--nsamples", "8", "--save-model", f"{out}/updated.safetensors")
        well("train", *TRAIN, *masks, "--output", f"{out}/learned.safetensors")
        well("validate", *MODEL, *masks, "--sparsity-mode", "sparse", "--results-file", f"{out}/results.json")
        well("export", "--model", "test_vit", *MODEL[2:6], *masks, "-o", f"{out}/packed.safetensors")
        return {path.name: path.read_bytes() for path in out.glob("*") if path.suffix != ".csv"}

    usual = files("usual")
    for name in ("train", "eval", "to", "cpu", "requires_grad_"):
        monkeypatch.setattr(VisionTransformer, name, silent(getattr(nn.Module, name)), raising=False)
    assert VisionTransformer(depth=1, embed_dim=24, num_heads=2).eval() is None
    assert files("silent") == usual
    assert len(usual) == 6
