"""Masks of a small diffusion transformer while they are learned: their score, and activations computed again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from regression import logits
from small_diffusion import dit, experiment, open_small

from maskllm4v.config import LearningSettings
from maskllm4v.data import prepare
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.surgery import fold_, make_learnable, set_noise_key
from maskllm4v.tasks.diffusion.task import Diffusion
from maskllm4v.training.mask_learning import CURVE_COLUMNS, MaskResult, learn_masks

DATA = {"name": "digits", "source": "digits", "calibration": 30, "holdout": 40}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    path = tmp_path_factory.mktemp("digits")
    prepare(experiment(data=DATA).data, path)
    return open_small(path, data=DATA)


def learnable(task: Diffusion) -> nn.Module:
    """Undecided masks: what they let through depends on the noise."""
    return make_learnable(dit(), None, pattern="2:4", exclude=task.model.excluded_layers, seed=3)


def settings(**changes: Any) -> LearningSettings:
    return LearningSettings(**{"steps": 4, "batch_size": 16, "lr": 0.1, "log_every": 1, "distillation": 0.5, **changes})


# The score


def test_score_is_of_the_arg_max_masks(task: Diffusion) -> None:
    """Whatever the noise of the step before, and though the masks were being trained."""
    model, soft = learnable(task), []
    wanted = task.score(fold_(copy.deepcopy(model)), "holdout")
    (batch,) = task.train_batches(seed=0, batch_size=4, steps=1)
    for step in (0, 1):
        for layer in learnable_masks(model).values():
            layer.train()
        set_noise_key(model, NoiseKey(0, step, 0, 0))
        with torch.no_grad():
            soft.append(task.forward(model, batch))
        assert task.score(model, "holdout") == pytest.approx(wanted, rel=1e-6)
        assert not any(module.training for module in model.modules())
    assert (soft[0] - soft[1]).abs().max() > 1e-3  # the noise shows


def test_best_masks_are_those_of_the_best_score(task: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = learnable(task), []
    score = Diffusion.score

    def watched(self: Diffusion, model: nn.Module, split: str) -> float:
        found = score(self, model, split)
        seen.append((found, logits(model)))
        return found

    monkeypatch.setattr(Diffusion, "score", watched)
    learn_masks(model, task, settings(steps=6, batch_size=400, lr=1.0, select="best"))
    assert len(seen) == 3  # two steps an epoch
    best, kept = max(seen, key=lambda pair: pair[0])
    assert len({found for found, _ in seen}) == 3
    assert all(torch.equal(value, kept[name]) for name, value in logits(model).items())
    assert task.score(model, "holdout") == pytest.approx(best, rel=1e-6)


# Activations


def learned(task: Diffusion, *, again: bool) -> tuple[nn.Module, MaskResult, int]:
    """With the number of times that the last block was run."""
    model, runs = learnable(task), []
    model.transformer_blocks[-1].register_forward_pre_hook(lambda *_: runs.append(1))
    return model, learn_masks(model, task, settings(grad_checkpointing=again)), len(runs)


def test_activations_that_are_computed_again_change_nothing(task: Diffusion) -> None:
    kept, curve, runs = learned(task, again=False)
    recomputed, same, more = learned(task, again=True)
    assert (runs, more) == (4 * 2, 4 * 3)  # forward and the teacher's; backward
    assert all(torch.equal(mask, same.masks[name]) for name, mask in curve.masks.items())
    for point, other in zip(curve.curve, same.curve, strict=True):
        assert dict(zip(CURVE_COLUMNS, other, strict=True)) == pytest.approx(
            dict(zip(CURVE_COLUMNS, point, strict=True)), rel=1e-4, abs=1e-6
        )
    for name, value in logits(kept).items():
        torch.testing.assert_close(logits(recomputed)[name], value, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(value, logits(learnable(task))[name]) for name, value in logits(kept).items())
    assert not recomputed.is_gradient_checkpointing
