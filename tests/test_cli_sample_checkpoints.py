"""The command sample on checkpoints: which architecture a folder is taken for, and what pictures are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run, well
from torch import nn

pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel
from small_diffusion import dit
from test_cli_sample import FAST, folder_of_diffusers, made, masked, picture

MASKS = ("--classes", "1", "--masks")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("said", [1e-5, 0.5])
def test_folder_has_the_papers_norm_eps_whatever_it_says(
    said: float, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many say 1e-5, diffusers' default, with which no DiT was trained."""
    used = set()
    forward = DiTTransformer2DModel.forward

    def watched(self: Any, *inputs: torch.Tensor, **others: Any) -> Any:
        used.update(module.eps for module in self.modules() if isinstance(module, nn.LayerNorm))
        return forward(self, *inputs, **others)

    folder_of_diffusers(dit(norm_eps=said), here / "folder")
    folder_of_diffusers(dit(norm_eps=1e-6), here / "paper")
    monkeypatch.setattr(DiTTransformer2DModel, "forward", watched)
    for name in ("folder", "paper"):
        well("sample", *FAST, "--checkpoint", name, "--classes", "1", "2")
    assert used == {1e-6}
    assert np.array_equal(picture("folder"), picture("paper"))


def test_masks_of_the_pipeline_are_called_after_their_row(here: Path) -> None:
    folder_of_diffusers(dit(), here / "DiT")
    files = ["rows/wanda/seed0.safetensors", "rows/learned/seed0.safetensors", "rows/learned/seed12.safetensors"]
    for number, name in enumerate((*files, "other-seed0.safetensors", "seeds.safetensors")):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        masked(here / name, dit(), last=bool(number % 2))
    well("sample", *FAST, "--checkpoint", "DiT", *MASKS, *files, "other-seed0.safetensors", "seeds.safetensors")
    names = ["DiT", "learned-seed0", "learned-seed12", "other-seed0", "seeds", "wanda-seed0"]
    assert made() == [f"{name}.png" for name in names]
    assert np.array_equal(picture("learned-seed12"), picture("wanda-seed0"))
    assert not np.array_equal(picture("learned-seed0"), picture("wanda-seed0"))


def test_masks_of_the_folder_that_one_is_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_diffusers(dit(), here / "DiT")
    (here / "wanda").mkdir()
    monkeypatch.chdir(here / "wanda")
    masked(Path("seed0.safetensors"), dit(), last=True)
    well("sample", *FAST, "--checkpoint", "../DiT", *MASKS, "seed0.safetensors")
    assert made() == ["DiT.png", "wanda-seed0.png"]


def test_rows_of_the_same_name_in_two_folders(here: Path) -> None:
    folder_of_diffusers(dit(), here / "DiT")
    files = ["a/wanda/seed0.safetensors", "b/wanda/seed0.safetensors"]
    for name in files:
        (here / name).parent.mkdir(parents=True)
        masked(here / name, dit(), last=True)
    assert "two files of the same name" in run("sample", *FAST, "--checkpoint", "DiT", *MASKS, *files).err
