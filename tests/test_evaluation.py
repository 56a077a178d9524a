"""Metrics, counts and per-layer diagnostics against brute force."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskllm4v.checkpoints import MaskCheckpoint, load_dense, load_masks, save_dense, save_masks
from maskllm4v.config import Experiment, ModelSettings, parse_experiment
from maskllm4v.data import prepare
from maskllm4v.diagnostics import COLUMNS, layer_diagnostics
from maskllm4v.errors import CheckpointError
from maskllm4v.evaluation import install, measure
from maskllm4v.layers import MaskedLinear
from maskllm4v.models import PLAIN_VIT, build_model
from maskllm4v.patterns import NMPattern
from maskllm4v.surgery import prunable_linears
from maskllm4v.tasks.classification import Classification

ARGS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
}


def experiment(classes: int = 10, **task: Any) -> Experiment:
    return parse_experiment(
        {
            "table": "t",
            "title": "T",
            "seeds": [0],
            "data": {"name": "digits", "source": "digits", "calibration": 50},
            "task": {"eval_batch_size": 100, **task},
            "model": {"name": PLAIN_VIT, "args": {**ARGS, "num_classes": classes}, "fused_attention": False},
            "dense": {"row": "dense", "init": "scratch"},
            "rows": {"dense": "Dense"},
            "runtime": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare(experiment().data, path)
    return path


@pytest.fixture
def task(folder: Path) -> Classification:
    return Classification(experiment(), folder)


def metrics_by_hand(model: nn.Module, task: Classification) -> dict[str, float]:
    """One image's rank and loss at a time, in float64."""
    with torch.no_grad():
        logits = model(task.data.images("test", np.arange(899), None)).double().numpy()
    labels = task.data.labels("test").tolist()
    ranks = [sum(other > row[label] for other in row) for row, label in zip(logits, labels, strict=True)]
    nll = [np.log(np.exp(row - row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    return {
        "top1": 100 * sum(rank < 1 for rank in ranks) / 899,
        "top5": 100 * sum(rank < 5 for rank in ranks) / 899,
        "nll": sum(nll) / 899,
    }


def random_masks(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = prunable_linears(model, exclude=["head"])
    return {
        name: (torch.rand(layer.weight.numel() // 4, 4, generator=generator).argsort(1) < 2).reshape(layer.weight.shape)
        for name, layer in layers.items()
    }


def checkpoint(masks: dict[str, Tensor], **changes: Any) -> MaskCheckpoint:
    fields: dict[str, Any] = {"base": "", "method": "wanda", "weights": {}, "prior": {}}
    return MaskCheckpoint(NMPattern("2:4"), masks, **{**fields, **changes})


# Metrics


@pytest.mark.parametrize("batch_size", [100, 898, 899, 1000])
def test_metrics_are_counted_image_by_image(batch_size: int, folder: Path) -> None:
    task = Classification(experiment(eval_batch_size=batch_size), folder)
    model = task.build_model(0)
    nn.init.normal_(model.head.weight)  # timm starts it at zero
    found, wanted = task.evaluate(model), metrics_by_hand(model, task)
    assert found.keys() == wanted.keys()
    assert found["top1"] == pytest.approx(wanted["top1"], abs=1e-9)
    assert found["top5"] == pytest.approx(wanted["top5"], abs=1e-9)
    assert found["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
    assert 0 < found["top1"] < found["top5"] < 100


def test_top5_of_three_classes_is_everything(folder: Path) -> None:
    class Three(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 3)

    task = Classification(experiment(), folder)
    data = task.data
    data.manifest.splits["test"][:] = [e for e in data.manifest.splits["test"] if e.label < 3]  # type: ignore[index]
    found = task.evaluate(Three())
    assert found["top5"] == 100
    assert found["nll"] == pytest.approx(np.log(3))


def test_evaluation_leaves_training_mode(task: Classification) -> None:
    model = task.build_model(0).train()
    task.evaluate(model)
    assert not any(module.training for module in model.modules())


def test_loss_is_smoothed_cross_entropy(folder: Path) -> None:
    task = Classification(experiment(label_smoothing=0.1), folder)
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    logs = logits.double().log_softmax(1)
    wanted = -(0.9 * logs[range(6), labels] + 0.1 * logs.mean(1)).mean()
    assert task.loss(logits, (torch.empty(0), labels)).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_the_divergence_from_the_teacher(temperature: float, task: Classification) -> None:
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    p, q = ((x.double() / temperature).softmax(1) for x in (teacher, student))
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert task.distillation_loss(student, teacher, temperature).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert task.distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_calibration_batches_are_the_manifests_without_augmentation(folder: Path) -> None:
    task = Classification(experiment(shift=2), folder)
    batches = list(task.calibration_batches(20))
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    chosen = task.data.manifest.calibration
    assert torch.equal(torch.cat([images for images, _ in batches]), task.data.images("train", chosen, None))
    assert torch.equal(torch.cat([labels for _, labels in batches]), task.data.labels("train")[chosen])


def test_train_batches_start_where_asked(folder: Path) -> None:
    task = Classification(experiment(shift=1), folder)
    whole = list(task.train_batches(seed=1, batch_size=100, steps=10))
    tail = list(task.train_batches(seed=1, batch_size=100, steps=10, start=7))
    assert task.steps_per_epoch(100) == 8
    assert len(tail) == 3
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[7:], tail, strict=True))


# measure


def test_dense_row_is_measured(folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment(), folder)
    model = task.build_model(5)
    nn.init.normal_(model.head.weight)
    digest = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    found = measure(experiment(), task, 0, tmp_path / "dense", None)
    total = sum(p.numel() for p in model.parameters())
    assert found.parameters == {"dense": total, "kept": total, "logits": 0}
    assert (found.dense, found.masks, found.layers) == (digest, None, [])
    assert found.metrics["nll"] == pytest.approx(metrics_by_hand(model, task)["nll"], rel=1e-5)


@pytest.mark.parametrize("method", ["wanda", "maskllm"])
@pytest.mark.parametrize("updated", [False, True])
def test_sparse_row_is_measured(method: str, updated: bool, folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment(), folder)
    model = task.build_model(5)
    nn.init.normal_(model.head.weight)
    base = save_dense(tmp_path / "dense", model, PLAIN_VIT)
    masks = random_masks(model)
    weights = {name: torch.randn(mask.shape) for name, mask in masks.items()} if updated else {}
    prior = random_masks(model, 1) if method == "maskllm" else {}
    wanted = checkpoint(masks, base=base, method=method, weights=weights, prior=prior)
    digest = save_masks(tmp_path / "masks", wanted)
    found = measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks")

    total = sum(p.numel() for p in model.parameters())
    pruned = sum(mask.numel() for mask in masks.values()) // 2
    logits = 6 * sum(mask.numel() // 4 for mask in masks.values()) if method == "maskllm" else 0
    assert found.parameters == {"dense": total, "kept": total - pruned, "logits": logits}
    assert (found.dense, found.masks) == (base, digest)
    assert [line[0] for line in found.layers] == [name for name, _ in model.named_modules() if name in masks]
    assert all((line[1] == "") == (method == "wanda") for line in found.layers)
    with torch.no_grad():
        for name, mask in masks.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(weights.get(name, layer.weight) * mask)
    by_hand = metrics_by_hand(model, task)
    assert found.metrics["nll"] == pytest.approx(by_hand["nll"], rel=1e-5)
    assert found.metrics["top1"] == pytest.approx(by_hand["top1"], abs=0.2)


def test_masks_of_another_dense_model_are_refused(folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment(), folder)
    model = task.build_model(0)
    save_dense(tmp_path / "dense", model, PLAIN_VIT)
    save_masks(tmp_path / "masks", checkpoint(random_masks(model), base="ab" * 32))
    with pytest.raises(CheckpointError, match="masks belongs to another dense model"):
        measure(experiment(), task, 0, tmp_path / "dense", tmp_path / "masks")


@pytest.mark.parametrize("fault", ["name", "shape", "convolution"])
def test_unfit_masks_are_refused_with_their_file(fault: str, folder: Path, tmp_path: Path) -> None:
    task = Classification(experiment(), folder)
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
    weights = {"blocks.0.mlp.fc1": torch.randn_like(model.blocks[0].mlp.fc1.weight)}
    kept = model.blocks[1].mlp.fc1.weight.detach().clone()
    install(model, checkpoint(masks, weights=weights), "here")
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MaskedLinear)
        assert torch.equal(layer.current_mask(), mask)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1"])
    assert torch.equal(model.blocks[1].mlp.fc1.weight, kept)
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
    weights = {"blocks.0.mlp.fc1": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=r"here: layer 'blocks\.0\.mlp\.fc1' does not fit"):
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
    weights = {"blocks.0.mlp.fc1": torch.randn(64, 16)} if updated else {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = layer_diagnostics(
        model, checkpoint(masks, prior=prior, weights=weights), task, task.calibration_batches(16)
    )

    inputs: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        return lambda module, args, output: inputs.update({name: args[0].double().reshape(-1, module.in_features)})

    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in masks]
    with torch.no_grad():
        model(task.data.images("train", task.data.manifest.calibration, None))
    for handle in handles:
        handle.remove()
    assert COLUMNS == ("layer", "prior_agreement", "kept_energy", "output_error")
    assert [line[0] for line in found] == list(masks)
    for name, agreement, energy, error in found:
        dense, mask = before[f"{name}.weight"].double(), masks[name]
        sparse = weights[name].double() * mask if name in weights else dense * mask
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
    found = layer_diagnostics(model, checkpoint(masks), task, task.calibration_batches(50))
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
    assert task.evaluate(other) == pytest.approx(wanted.metrics, rel=1e-6)


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
        build_model(ModelSettings(name=name, args={"depth": 1}), 0, pretrained=True)
    assert "\n" not in str(caught.value)
    assert not tried
