"""Measuring a row from its files: metrics, counts and per-layer diagnostics against brute force."""

from __future__ import annotations

import copy
import dataclasses
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_digits import checkpoint, experiment, metrics_by_hand, random_masks
from torch import Tensor, nn

from maskllm4v.checkpoints.apply import install
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_dense, load_masks, save_dense, save_masks
from maskllm4v.data import prepare
from maskllm4v.evaluation.evaluate import measure
from maskllm4v.evaluation.layer_errors import COLUMNS, layer_diagnostics
from maskllm4v.sparsity.layers import MaskedLinear, dense_weight
from maskllm4v.tasks.classification.models import PLAIN_VIT, build_model
from maskllm4v.tasks.classification.settings import TimmSettings
from maskllm4v.tasks.classification.task import Classification
from maskllm4v.utils.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare(experiment().data, path)
    return path


@pytest.fixture
def task(folder: Path) -> Classification:
    return Classification(experiment().task_spec(), folder)


def agreement(model: nn.Module, dense: nn.Module, task: Classification) -> float:
    """Share of test images that two models put into the same class, in percent."""
    images = task.source.images("test", np.arange(899), None)
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == dense(images).argmax(1)).double().mean())


# measure


def test_dense_row_is_measured(folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment().task_spec(), folder)
    model = task.build_model(5)
    nn.init.normal_(model.head.weight)
    digest = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    found = measure(experiment(), task, 0, tmp_path / "dense", None)
    total = sum(p.numel() for p in model.parameters())
    assert found.parameters == {"dense": total, "kept": total, "logits": 0}
    assert (found.dense, found.masks, found.layers) == (digest, None, [])
    assert found.metrics.keys() == {"top1", "top5", "nll", "ece"}
    assert found.summary == task.summary(model, found.metrics, 0)
    assert found.metrics["nll"] == pytest.approx(metrics_by_hand(model, task)["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "logits_a_group"), [("wanda", None), ("maskllm", {"candidates": 6}), ("maskllm", {"positions": 4})]
)
@pytest.mark.parametrize("updated", [False, True])
def test_sparse_row_is_measured(
    method: str, logits_a_group: dict[str, int] | None, updated: bool, folder: Path, tmp_path: Path
) -> None:
    task = Classification(experiment().task_spec(), folder)
    model = task.build_model(5)
    nn.init.normal_(model.head.weight)
    base = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    masks = random_masks(model)
    weights = {f"{name}.weight": torch.randn(mask.shape) for name, mask in masks.items()} if updated else {}
    prior = random_masks(model, 1) if method == "maskllm" else {}
    dense = copy.deepcopy(model)
    wanted = checkpoint(masks, base=base, method=method, weights=weights, prior=prior)
    ((gate, size),) = (logits_a_group or {"candidates": 0}).items()
    digest = save_masks(tmp_path / "masks", dataclasses.replace(wanted, gate=gate))
    found = measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks")

    total = sum(p.numel() for p in model.parameters())
    pruned = sum(mask.numel() for mask in masks.values()) // 2
    logits = size * sum(mask.numel() // 4 for mask in masks.values())
    assert found.parameters == {"dense": total, "kept": total - pruned, "logits": logits}
    assert (found.dense, found.masks) == (base, digest)
    assert [line[0] for line in found.layers] == [name for name, _ in model.named_modules() if name in masks]
    assert all((line[1] == "") == (method == "wanda") for line in found.layers)
    with torch.no_grad():
        for name, mask in masks.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(weights.get(f"{name}.weight", layer.weight) * mask)
    by_hand = metrics_by_hand(model, task)
    assert found.metrics["nll"] == pytest.approx(by_hand["nll"], rel=1e-5)
    assert found.metrics["top1"] == pytest.approx(by_hand["top1"], abs=0.2)
    assert found.metrics["agreement"] == pytest.approx(agreement(model, dense, task), abs=0.2)
    assert found.summary == task.summary(model, found.metrics, logits)


class Pictured(Classification):
    """A task that draws a layer's weights, so that one sees whose they are."""

    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        weight = model.get_submodule("blocks.0.mlp.fc1").weight.detach()
        return {"samples": (100 * weight.clamp(0, 2)).to(torch.uint8).numpy()}


def test_pictures_are_of_the_model_measured_and_of_the_first_seed(folder: Path, tmp_path: Path) -> None:
    task = Pictured(experiment().task_spec(), folder)
    model = task.build_model(5)
    nn.init.normal_(model.blocks[0].mlp.fc1.weight)
    base = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    masks = random_masks(model)
    save_masks(tmp_path / "masks", checkpoint(masks, base=base))
    first, second = experiment().seeds[0], experiment().seeds[0] + 1
    dense = task.pictures(model)["samples"]
    found = measure(experiment(), task, first, tmp_path / "dense", None)
    assert np.array_equal(found.pictures["samples"], dense)
    found = measure(experiment(), task, first, tmp_path / "dense", tmp_path / "masks")
    assert np.array_equal(found.pictures["samples"], dense * masks["blocks.0.mlp.fc1"].numpy())
    assert measure(experiment(), task, second, tmp_path / "dense", None).pictures == {}


@pytest.mark.parametrize("start", ["dense", "wanda"])
def test_finetuned_row_is_measured(start: str, folder: Path, tmp_path: Path) -> None:
    """Every tensor may have changed, and there may be no mask at all."""
    task = Classification(experiment().task_spec(), folder)
    model, after = task.build_model(5), task.build_model(6)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(after.head.weight)
    base = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    masks = random_masks(model) if start == "wanda" else {}
    pattern = checkpoint(masks).pattern if masks else None
    wanted = MaskCheckpoint(pattern, masks, base, "finetuned", dict(after.state_dict()), prior={})
    digest = save_masks(tmp_path / "masks", wanted)
    found = measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks", "2:4" if masks else None)
    total = sum(p.numel() for p in model.parameters())
    pruned = sum(mask.numel() for mask in masks.values()) // 2
    assert found.parameters == {"dense": total, "kept": total - pruned, "logits": 0}
    assert (found.dense, found.masks, [line[0] for line in found.layers]) == (base, digest, list(masks))
    with torch.no_grad():
        for name, mask in masks.items():
            after.get_submodule(name).weight.mul_(mask)
    assert found.metrics["nll"] == pytest.approx(metrics_by_hand(after, task)["nll"], rel=1e-5)
    assert found.metrics["agreement"] == pytest.approx(agreement(after, model, task), abs=0.2)


def test_masks_of_another_pattern_are_refused(folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment().task_spec(), folder)
    model = task.build_model(0)
    base = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    save_masks(tmp_path / "masks", checkpoint(random_masks(model), base=base))
    with pytest.raises(CheckpointError, match="masks holds 2:4 masks, not 4:8 ones"):
        measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks", "4:8")


def test_masks_of_another_dense_model_are_refused(folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment().task_spec(), folder)
    model = task.build_model(0)
    save_dense(tmp_path / "dense", model, PLAIN_VIT)
    save_masks(tmp_path / "masks", checkpoint(random_masks(model), base="ab" * 32))
    with pytest.raises(CheckpointError, match="masks belongs to another dense model"):
        measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks")


@pytest.mark.parametrize("fault", ["name", "shape", "convolution"])
def test_unfit_masks_are_refused_with_their_file(fault: str, folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment().task_spec(), folder)
    model = task.build_model(0)
    base = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    mask = random_masks(model)["blocks.0.mlp.fc1"]
    masks = {
        "name": {"blocks.9.mlp.fc1": mask},
        "shape": {"blocks.0.mlp.fc1": mask[:8]},
        "convolution": {"patch_embed.proj": mask},
    }[fault]
    save_masks(tmp_path / "masks", checkpoint(masks, base=base))
    with pytest.raises(CheckpointError, match=f"masks: layer '{next(iter(masks))}' does not fit the model"):
        measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks")


# install


def test_install_gives_masked_layers(task: Classification) -> None:
    model = task.build_model(0)
    masks = random_masks(model)
    weights = {"blocks.0.mlp.fc1.weight": torch.randn_like(model.blocks[0].mlp.fc1.weight)}
    kept = model.blocks[1].mlp.fc1.weight.detach().clone()
    install(model, checkpoint(masks, weights=weights), "here")
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MaskedLinear)
        assert torch.equal(layer.current_mask(), mask)
    assert torch.equal(dense_weight(model.blocks[0].mlp.fc1), weights["blocks.0.mlp.fc1.weight"])
    assert torch.equal(dense_weight(model.blocks[1].mlp.fc1), kept)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("name", ["blocks.9.mlp.fc1", "patch_embed.proj", "blocks.0.norm1", ""])
def test_install_refuses_masks_of_no_linear_layer(name: str, task: Classification) -> None:
    model = task.build_model(0)
    mask = random_masks(model)["blocks.0.mlp.fc1"]
    with pytest.raises(CheckpointError, match=f"here: layer '{name}' does not fit the model"):
        install(model, checkpoint({name: mask}), "here")


def test_install_refuses_another_shape(task: Classification) -> None:
    model = task.build_model(0)
    mask = random_masks(model)["blocks.0.mlp.fc1"]
    with pytest.raises(CheckpointError, match=r"here: layer 'blocks\.0\.mlp\.fc1' does not fit"):
        install(model, checkpoint({"blocks.0.mlp.fc1": mask[:4]}), "here")


@pytest.mark.parametrize("shape", [(1, 16), (64, 1), (16, 64)])
def test_install_refuses_updated_weights_of_another_shape(shape: tuple[int, int], task: Classification) -> None:
    model = task.build_model(0)
    masks = random_masks(model)
    weights = {"blocks.0.mlp.fc1.weight": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=r"here: tensor 'blocks\.0\.mlp\.fc1\.weight' does not fit"):
        install(model, checkpoint(masks, weights=weights), "here")


# Diagnostics


@pytest.mark.parametrize("updated", [False, True])
def test_diagnostics_are_brute_force(updated: bool, task: Classification) -> None:
    model = task.build_model(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    masks, prior = random_masks(model), random_masks(model, 1)
    prior["blocks.0.attn.qkv"] = masks["blocks.0.attn.qkv"].clone()
    del prior["blocks.1.mlp.fc2"]
    weights = {"blocks.0.mlp.fc1.weight": torch.randn(64, 16)} if updated else {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = layer_diagnostics(model, checkpoint(masks, prior=prior, weights=weights), task.calibration(16, 0))

    inputs: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        return lambda module, args, output: inputs.update({name: args[0].double().reshape(-1, module.in_features)})

    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in masks]
    with torch.no_grad():
        model(task.source.images("train", task.source.manifest.calibration[0], None))
    for handle in handles:
        handle.remove()
    assert COLUMNS == ("layer", "prior_agreement", "kept_energy", "output_error")
    assert [line[0] for line in found] == list(masks)
    for name, agreement, energy, error in found:
        dense, mask = before[f"{name}.weight"].double(), masks[name]
        sparse = weights.get(f"{name}.weight", dense).double() * mask
        wanted = torch.linalg.norm(inputs[name] @ (dense - sparse).T) / torch.linalg.norm(inputs[name] @ dense.T)
        assert float(error) == pytest.approx(wanted.item(), rel=1e-4)
        kept = sum(w**2 for w, m in zip(dense.flatten().tolist(), mask.flatten().tolist(), strict=True) if m)
        assert float(energy) == pytest.approx(kept / dense.square().sum().item(), rel=1e-5)
        if name not in prior:
            assert agreement == ""
            continue
        groups = list(zip(mask.reshape(-1, 4).tolist(), prior[name].reshape(-1, 4).tolist(), strict=True))
        assert float(agreement) == pytest.approx(sum(a == b for a, b in groups) / len(groups), rel=1e-5)
    assert float(found[0][1]) == 1
    assert 0 < float(found[1][1]) < 0.5
    # neither weights nor hooks are left changed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_diagnostics_of_a_zero_layer_are_numbers(task: Classification) -> None:
    model = task.build_model(0)
    nn.init.zeros_(model.blocks[0].mlp.fc1.weight)
    masks = {"blocks.0.mlp.fc1": random_masks(model)["blocks.0.mlp.fc1"]}
    found = layer_diagnostics(model, checkpoint(masks), task.calibration(50, 0))
    assert found == [("blocks.0.mlp.fc1", "", "1", "0")]


def test_round_trip_through_files_measures_the_same(task: Classification, tmp_path: Path) -> None:
    model = task.build_model(0)
    nn.init.normal_(model.head.weight)
    base = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    save_masks(tmp_path / "masks", checkpoint(random_masks(model), base=base))
    wanted = measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks")
    other = task.build_model(9)
    assert load_dense(tmp_path / "dense", other, PLAIN_VIT) == base
    install(other, load_masks(tmp_path / "masks", base=base), "here")
    dense = task.build_model(0)
    load_dense(tmp_path / "dense", dense, PLAIN_VIT)
    assert task.evaluate(other, dense=dense) == pytest.approx(wanted.metrics, rel=1e-6)


# Pretrained models (the rest is in test_models.py)


def test_pretrained_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = []

    def refuse(*args: Any, **_: Any) -> Any:
        tried.append(args)
        raise OSError("no network in tests")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read once, at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    name = "vit_tiny_patch16_224"
    with pytest.raises(CheckpointError, match=f"^no pretrained weights for '{name}': .") as caught:
        build_model(TimmSettings(name=name, args={"depth": 1}), 0, pretrained=True)
    assert "\n" not in str(caught.value)
    assert not tried
