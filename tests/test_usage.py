"""Masks that nobody uses are an error in the first step of whatever trains, named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from regression import Regression, settings
from small_project import said, together
from torch import Tensor, nn

from maskllm4v import apply_masks_, dense_weight, each_mask_used, learn_masks, make_learnable
from maskllm4v.config import FinetunedSettings
from maskllm4v.sparsity.masks import Mask
from maskllm4v.training.finetuning import finetune
from maskllm4v.utils.errors import ConfigError, TrainingError
from maskllm4v.utils.processes import rank


class Net(nn.Sequential):
    """Two layers, of which ``idle`` says what happens to the second one's weight."""

    def __init__(self, idle: str = "") -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 16), nn.Linear(16, 4))
        self.idle = idle

    def forward(self, x: Tensor) -> Tensor:
        x, last = torch.relu(self[0](x)), self[1]
        if self.idle == "unread" or (self.idle == "unread in one process" and rank() == 1):
            return x[:, :4]
        if self.idle == "dense":
            return F.linear(x, dense_weight(last), last.bias)
        if self.idle == "without effect":
            return x[:, :4].to(last.weight.dtype)
        return last(x)


def learn(idle: str, **changes: Any) -> nn.Module:
    model = make_learnable(Net(idle), None, pattern="2:4")
    learn_masks(model, Regression(), settings(steps=2, **changes), row="mine")
    return model


UNREAD = "layer '1': nothing read the masked weight in the first batch"
NOT_LEARNED = "layer '1': the loss of the first batch gives no gradient"
FAULTS = {"unread": UNREAD, "dense": UNREAD, "without effect": NOT_LEARNED}


@pytest.mark.parametrize("regularisation", [0.0, 1e-4])  # which gives all logits a gradient that are drawn
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("idle", FAULTS)
def test_masks_without_effect_are_not_learned(idle: str, accumulate: int, regularisation: float) -> None:
    with pytest.raises(TrainingError, match=f"^mine: {FAULTS[idle]}.*`exclude`"):
        learn(idle, accumulate=accumulate, regularisation=regularisation)


@pytest.mark.parametrize("how", [{}, {"distillation": 1.0}, {"amp": "bf16"}, {"accumulate": 2}])
def test_used_masks_are_learned_and_no_longer_watched(how: dict[str, Any]) -> None:
    model = learn("", **how)
    masks = [module for module in model.modules() if isinstance(module, Mask)]
    assert len(masks) == 2
    assert all(mask.on_read is None for mask in masks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_compiled_parts_are_used(parts: int) -> None:
    model = make_learnable(Net(), None, pattern="2:4")
    for layer in [*model][:parts]:
        layer.compile(backend="eager")
    learn_masks(model, Regression(), settings(steps=2), row="mine")


def test_a_compiled_model_may_not_lack_gradients() -> None:
    model = make_learnable(Net("unread"), None, pattern="2:4")
    model[0].compile(backend="eager")
    with pytest.raises(TrainingError, match=f"^mine: {NOT_LEARNED}"):
        learn_masks(model, Regression(), settings(steps=2, regularisation=0.0), row="mine")


@pytest.mark.parametrize("idle", ["", "unread", "dense"])
def test_weights_are_trained_under_masks_that_are_read(idle: str) -> None:
    mask = torch.tensor([True, True, False, False])
    model = apply_masks_(Net(idle), {"0": mask.repeat(16, 4), "1": mask.repeat(4, 4)}, "2:4")
    how = FinetunedSettings(start="dense", steps=2, batch_size=32, lr=0.01)
    if not idle:
        finetune(model, Regression(), how, seed=0, row="mine")
        return
    with pytest.raises(TrainingError, match=f"^mine: {UNREAD}"):
        finetune(model, Regression(), how, seed=0, row="mine")


# On several processes


def _learn(idle: str) -> None:
    learn(idle)


@pytest.mark.parametrize("idle", [*FAULTS, "unread in one process"])
def test_all_processes_name_it(idle: str, tmp_path: Path) -> None:
    """Not one that waits for gradients which never come."""
    assert together(tmp_path, _learn, idle, processes=2) == [70, 70]
    assert all(f"mine: {FAULTS.get(idle, UNREAD)}" in said(tmp_path, rank) for rank in (0, 1))


# Loops of one's own


def once(model: nn.Module, *, backward: bool = True) -> None:
    with each_mask_used(model):
        outputs = model(torch.randn(8, 16))
        if backward:
            outputs.square().sum().backward()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("idle", ["unread", "dense"])
def test_own_loops_are_told(idle: str, training: bool) -> None:
    model = make_learnable(Net(idle), None, pattern="2:4").train(training)
    with pytest.raises(ConfigError, match=f"^{UNREAD}"):
        once(model, backward=False)
    once(make_learnable(Net(), None, pattern="2:4").train(training), backward=training)


def test_own_loops_are_told_of_missing_gradients() -> None:
    model = make_learnable(Net("without effect"), None, pattern="2:4").train()
    once(model, backward=False)
    with pytest.raises(ConfigError, match=f"^{NOT_LEARNED}"):
        once(model)


@pytest.mark.parametrize("use", [lambda model: None, lambda model: 1 / 0], ids=["unread", "error"])
def test_masks_are_watched_inside_alone(use: Callable[[nn.Module], object]) -> None:
    model = make_learnable(Net(), None, pattern="2:4")
    with pytest.raises((ConfigError, ZeroDivisionError)), each_mask_used(model):
        use(model)
    assert all(module.on_read is None for module in model.modules() if isinstance(module, Mask))


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    model = make_learnable(Net(), None, pattern="2:4")
    with each_mask_used(model):
        model(torch.randn(8, 16))
        assert all(module.on_read is None for module in copy.deepcopy(model).modules() if isinstance(module, Mask))
