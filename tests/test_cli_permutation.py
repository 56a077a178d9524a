"""The command prune with --permutation, and what other commands do with its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from commands import DENSE, MODEL, TRAIN, make_project, measured, run, well

import maskllm4v
from maskllm4v.checkpoints.masks import load_masks
from maskllm4v.checkpoints.packed import load_packed_file

ARCHITECTURE = MODEL[:6]  # no data, no workers
GREEDY = (*MODEL, *DENSE, "-b", "3", "--nsamples", "3", "--permutation", "greedy")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = well("prune", *GREEDY, "--pruner", "wanda", "--save-model", "prior.safetensors")
    assert f"permuted the input channels of {len(permuted(folder / 'prior.safetensors'))} layers" in done.err
    return folder


def permuted(path: Path) -> list[str]:
    found = load_masks(path).permutations
    assert found
    assert {name.rpartition(".")[2] for name in found} == {"proj", "fc2"}
    return sorted(found)


def test_exports_are_measured_like_the_masks(here: Path) -> None:
    expected = measured("--checkpoint", "prior.safetensors", "--sparsity-mode", "sparse")
    flags = ("--checkpoint", "prior.safetensors", *ARCHITECTURE)
    for format in ("packed", "mask", "dense"):
        well("export", *flags, "--format", format, "-o", f"{format}.safetensors")
    assert measured("--checkpoint", "packed.safetensors", "--sparsity-mode", "sparse") == expected
    assert measured("--checkpoint", "mask.safetensors", "--sparsity-mode", "sparse", *DENSE) == expected
    assert measured("--checkpoint", "dense.safetensors") == expected
    model = maskllm4v.load_packed(timm.create_model("test_vit", num_classes=3, img_size=32), "packed.safetensors")
    tensors = load_packed_file(here / "packed.safetensors").tensors
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_masks_are_learned_on_the_permuted_model(here: Path) -> None:
    well("train", *TRAIN, "--checkpoint", "prior.safetensors", "--output", "learned.safetensors")
    prior, learned = load_masks(here / "prior.safetensors"), load_masks(here / "learned.safetensors")
    assert permuted(here / "learned.safetensors") == permuted(here / "prior.safetensors")
    assert all(torch.equal(order, prior.permutations[name]) for name, order in learned.permutations.items())
    assert all(torch.equal(mask, prior.masks[name]) for name, mask in learned.prior.items())
    assert learned.base == prior.base
    flags = ("--checkpoint", "learned.safetensors", *ARCHITECTURE, "-o", "packed.safetensors")
    well("export", *flags)
    sparse = ("--sparsity-mode", "maskllm")
    assert measured("--checkpoint", "packed.safetensors", *sparse) == measured(
        "--checkpoint", "learned.safetensors", *sparse
    )


def test_masks_of_a_packed_file_do_not_fit_the_dense_model(here: Path) -> None:
    well("export", "--checkpoint", "prior.safetensors", *ARCHITECTURE, "-o", "packed.safetensors")
    done = run("train", *TRAIN, *DENSE, "--checkpoint", "packed.safetensors", "--output", "learned.safetensors")
    assert done.code == 1
    assert "packed.safetensors: its channels are permuted; start from the masks of prune or train" in done.err
    assert not (here / "learned.safetensors").exists()


def test_methods_without_data_look_at_none(here: Path) -> None:
    shutil.rmtree(here / "data")
    well("prune", *GREEDY, "--pruner", "magnitude", "--save-model", "alone.safetensors")
    assert permuted(here / "alone.safetensors")
