"""Each kind of transformers' segmenters, tiny and random: pruned, updated, its masks learned, evaluated and written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_segmenters
import torch
from tiny_segmenters import CLASSES, CONFIGS
from torch import Tensor, nn

from maskllm4v import apply_masks_, current_masks, fold_, learn_masks, make_learnable, prune, update_weights_
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks, save_masks
from maskllm4v.config import LearningSettings
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import EXCLUDED

pytest.importorskip("transformers")

# What holds matrices that are neither excluded nor pruned: convolutions, and what is looked up by place.
LEFT_DENSE = ("convolution", "SwinRelativePositionBias", "Mask2FormerPixelDecoder", "SamVisionSdpaAttention")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models' folders by name, and the prepared data."""
    return tmp_path_factory.mktemp("segmenters")


def opened(name: str, folders: Path, **model: Any) -> Any:
    folder = folders / name
    if not folder.exists():
        tiny_segmenters.save(name, folder)
    return tiny_segmenters.task(name, folder, folders / "data", **model)


def outputs(task: Any, model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(task.family.logits(task.forward(model, batch), (32, 32)))


@pytest.mark.filterwarnings("ignore:masks cover only")  # of models as small as these, mostly convolutions
@pytest.mark.parametrize("name", CONFIGS)
def test_from_a_folder_to_masks_in_a_file(name: str, folders: Path, tmp_path: Path) -> None:
    task = opened(name, folders)
    dense = task.build_model(0, pretrained=True)
    batch = next(task.train_batches(seed=0, batch_size=4, steps=1))
    own = outputs(task, dense, batch)
    assert own.shape == (4, CLASSES, 32, 32)

    found, said = dict[str, Any](), list[str]()
    layers: dict[str, Any] = {"exclude": task.model.excluded_layers, "tell": said.append}
    for method, more in (("magnitude", {}), ("wanda", {}), ("sparsegpt", {"update_weights": True})):
        model = copy.deepcopy(dense)
        masks = prune(model, method, calibration=task.calibration(4, 0), **layers, **more)
        assert outputs(task, model, batch).isfinite().all()
        assert not torch.equal(outputs(task, model, batch), own)
        found[method] = masks
    linear = {layer for layer, module in dense.named_modules() if isinstance(module, nn.Linear)}
    kept = {layer for layer, why in masks.coverage.dense.items() if why.reason == EXCLUDED}
    assert linear - kept <= masks.keys()  # every layer of attention and MLPs
    others = {why.reason for layer, why in masks.coverage.dense.items() if layer not in kept}
    assert all(any(known in reason for known in LEFT_DENSE) for reason in others)

    updated = apply_masks_(copy.deepcopy(dense), found["wanda"], "2:4")
    before = errors(task, updated, dense, batch)
    update_weights_(updated, calibration=task.calibration(4, 0), dense=dense)
    assert errors(task, updated, dense, batch) < before

    learned = make_learnable(copy.deepcopy(dense), found["wanda"], pattern="2:4")
    start = {layer: mask.logits.detach().clone() for layer, mask in learnable_masks(learned).items()}
    settings = LearningSettings(steps=3, batch_size=4, accumulate=2, lr=0.1, distillation=0.5, log_every=1)
    result = learn_masks(learned, task, settings)
    assert all(not torch.equal(start[layer], mask.logits) for layer, mask in learnable_masks(learned).items())
    assert len(result.curve) == 3

    metrics = task.evaluate(learned, dense)
    assert 0 <= metrics["miou"] <= 100
    assert task.evaluate(dense, dense)["agreement"] == 100

    path = tmp_path / "masks.safetensors"
    save_masks(path, MaskCheckpoint(NMPattern("2:4"), result.masks, "", "maskllm", weights={}, prior={}))
    again = apply_masks_(task.build_model(0, pretrained=True), load_masks(path).masks, "2:4")
    torch.testing.assert_close(outputs(task, again, batch), outputs(task, learned, batch))
    assert current_masks(again).keys() == found["wanda"].keys()
    deployed = task.exportable(fold_(again), 2)
    assert [tuple(x.shape) for x in deployed.inputs.values()] == [(2, 1, 32, 32)]
    told = deployed.named(deployed.module(*deployed.inputs.values()))
    assert tuple(told) == task.family.outputs
    assert all(len(tensor) == 2 for tensor in told.values())


def errors(task: Any, model: nn.Module, dense: nn.Module, batch: Any) -> float:
    with torch.no_grad():
        return float(task.distillation_loss(task.forward(model, batch), task.forward(dense, batch), 1.0, batch))
