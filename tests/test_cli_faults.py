"""Commands on models, images and files that are not as usual."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import DENSE, MODEL, TRAIN, make_project, run, well
from timm.models import VisionTransformer
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks


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


# Models without classes, and with two classifiers

FEATURES = ("--model", "test_vit", "--num-classes", "0", "--img-size", "32", "-j", "0")


def features(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.items() if not name.startswith("head.")}


def test_features_only_models_are_calibrated(here: Path) -> None:
    torch.save(features(torch.load("dense.pt")), "features.pt")
    dense, shown = ("--dense-checkpoint", "features.pt"), ("--nsamples", "8")
    for pruner in ("wanda", "sparsegpt"):
        well("prune", *FEATURES, *dense, "--pruner", pruner, *shown, "--save-model", f"{pruner}.safetensors")
        well("prune", *MODEL, *DENSE, "--pruner", pruner, *shown, "--save-model", f"with/{pruner}.safetensors")
        assert same(load_masks(Path(f"{pruner}.safetensors")), load_masks(Path(f"with/{pruner}.safetensors")))
    well("update", *FEATURES, "--checkpoint", "wanda.safetensors", *shown, "--save-model", "updated.safetensors")
    assert load_masks(Path("updated.safetensors")).weights
    done = run("validate", *FEATURES, "--checkpoint", "features.pt")
    assert (done.code, done.out) == (1, "")
    assert "has 3 classes, but test_vit tells 0 apart" in done.err


def same(one: MaskCheckpoint, other: MaskCheckpoint) -> bool:
    return one.masks.keys() == other.masks.keys() and all(
        one.masks[name].equal(other.masks[name]) for name in one.masks
    )


def test_models_of_another_number_of_classes_are_still_refused(here: Path) -> None:
    shutil.rmtree(here / "data" / "imagenet" / "train" / "owl")
    masks = ("--save-model", "m.safetensors")
    done = run("prune", *MODEL, *DENSE, "--pruner", "wanda", "--nsamples", "4", *masks)
    assert (done.code, done.out) == (1, "")
    assert "has 2 classes, but test_vit tells 3 apart; say --num-classes" in done.err


@pytest.mark.parametrize("flags", [(), ("--exclude", "head"), ("--exclude", "head", "head_dist"), ("--exclude",)])
def test_the_other_classifier_of_a_distilled_model_is_excluded_too(flags: tuple[str, ...], here: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(name, num_classes=3, img_size=32).state_dict(), "deit.pt")
    done = well(
        *(
            "prune",
            "--model",
            name,
            *MODEL[2:],
            "--dense-checkpoint",
            "deit.pt",
            "--save-model",
            "m.safetensors",
            *flags,
        )
    )
    masks = load_masks(Path("m.safetensors")).masks
    pruned = {layer for layer in masks if layer.startswith("head")}
    assert pruned == ({"head", "head_dist"} if flags == ("--exclude",) else set())
    said = "--exclude head: head_dist, too, as deit_tiny_distilled_patch16_224 has several classifiers"
    assert (said in done.err) == (flags in ((), ("--exclude", "head")))
