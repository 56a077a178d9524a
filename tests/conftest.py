"""Settings for every test, and the tiny models that they share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import timm
import torch
import warm_python
from receipt_project import make_checkout
from shared import once
from small_pipeline import make_small
from timm.models import VisionTransformer
from torch import nn

torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another
hypothesis.settings.register_profile(
    "here",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine is no fault
)
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's generator, and with subnormal numbers, which trainings drop."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)


@pytest.fixture
def tiny_vit() -> nn.Module:
    """A timm ViT of width 32 and depth 2 for 1x8x8 images, 10 classes."""
    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=32,
        depth=2,
        num_heads=4,
        class_token=False,
        global_pool="avg",
        num_classes=10,
    )
    for block in model.blocks:
        block.attn.fused_attn = False
    return model.eval()


@pytest.fixture
def tiny_swin() -> nn.Module:
    """A timm Swin of four stages for 3x64x64 images: no chain of blocks holds most of its layers."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=24,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        img_size=64,
        window_size=2,
        num_classes=10,
    ).eval()


@pytest.fixture
def tiny_convnext() -> nn.Module:
    """A timm ConvNeXt of four stages for 3x64x64 images; its MLPs are linear layers."""
    return timm.create_model("convnext_tiny", dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_classes=10).eval()


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with all that the module's project holds."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def warm_processes() -> Iterator[None]:
    """Ends the server of warm processes, if a test has started it."""
    yield
    warm_python.session.close()


@pytest.fixture(scope="session")
def small_repro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small digits experiment made by DVC (:func:`small_pipeline.make_small`). One test may go on in ``repro``."""
    return once(tmp_path_factory, "small", make_small)


@pytest.fixture(scope="session")
def small_project(small_repro: Path) -> Path:
    """All results of the small digits experiment, to look at, and to copy where they may be changed."""
    return small_repro / "project"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with committed results (:func:`receipt_project.make_checkout`), to be copied and changed."""

    def make(folder: Path) -> None:
        make_checkout(folder / "checkout")

    return once(tmp_path_factory, "receipts", make) / "checkout"
