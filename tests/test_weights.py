"""Weights that are trained: a dense model's, or on under a fixed mask."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from regression import Noisy, Normalised, Regression, priors
from safetensors.torch import save_file
from torch import Tensor, nn

from maskllm4v.config import DenseSettings, FinetunedSettings
from maskllm4v.config.sections import ProgressiveSettings
from maskllm4v.sparsity.layers import dense_weight
from maskllm4v.sparsity.parameters import current_masks
from maskllm4v.sparsity.surgery import apply_masks_, fold_
from maskllm4v.training.dense import obtain_dense
from maskllm4v.training.finetuning import CURVE_COLUMNS, finetune, train_dense
from maskllm4v.utils.errors import CheckpointError

DENSE = DenseSettings(row="dense", init="scratch", steps=60, batch_size=32, lr=0.02)


def dense(**changes: Any) -> DenseSettings:
    return DENSE.model_copy(update=changes)


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# Dense training


def test_dense_training_lowers_the_loss_and_ends_in_evaluation_mode() -> None:
    task = Regression()
    model = task.build_model(0)
    batch = next(iter(task.calibration(256, 0)[0].batches))
    before = task.loss(model(batch[0]), batch).item()
    train_dense(model, task, DENSE, seed=0)
    assert task.loss(model(batch[0]), batch).item() < 0.6 * before
    assert not any(module.training for module in model.modules())


def by_hand(run: DenseSettings | FinetunedSettings, model: nn.Module, seed: int) -> list[tuple[float, ...]]:
    """AdamW (Loshchilov & Hutter) with warm-up and cosine on whole batches, in place; gives the curve."""
    assert run.steps is not None
    task, weights, points = Regression(dtype=torch.float64), list(model.parameters()), []
    first, second = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    (b1, b2), warm = run.betas, round(run.warmup * run.steps)
    for step, (x, y) in enumerate(task.train_batches(seed=seed, batch_size=run.batch_size, steps=run.steps)):
        loss = (model(x) - y).square().mean()
        gradients = torch.autograd.grad(loss, weights)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        lr = run.min_lr + (run.lr - run.min_lr) * (1 + math.cos(math.pi * step / max(run.steps - 1, 1))) / 2
        lr *= min(1.0, (step + 1) / warm) if warm else 1.0
        with torch.no_grad():
            for p, gradient, m, v in zip(weights, gradients, first, second, strict=True):
                gradient = gradient * (min(1.0, run.clip_grad / (norm + 1e-6)) if run.clip_grad else 1.0)
                m.mul_(b1).add_((1 - b1) * gradient)
                v.mul_(b2).add_((1 - b2) * gradient**2)
                update = m / (1 - b1 ** (step + 1)) / ((v / (1 - b2 ** (step + 1))).sqrt() + 1e-8)
                p.copy_(p * (1 - lr * run.weight_decay) - lr * update)
        if step % run.log_every == 0 or step == run.steps - 1:
            points.append((step, loss.item(), lr, norm))
    return points


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_dense_training_is_adamw_on_whole_batches(accumulate: int) -> None:
    run = dense(steps=5, warmup=0.4, clip_grad=0.5, betas=(0.8, 0.9), accumulate=accumulate)
    task = Regression(dtype=torch.float64)
    model, reference = task.build_model(0), task.build_model(0)
    train_dense(model, task, run, seed=2)
    by_hand(run, reference, 2)
    assert len(task.sizes) == 5 * accumulate
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [Regression().build_model, lambda _: Noisy()], ids=["plain", "dropout"])
def test_seed_decides_every_bit_of_the_dense_model(kind: Callable[[int], nn.Module]) -> None:
    found = []
    for seed, state in ((0, 0), (0, 1), (1, 0)):
        model = kind(0)
        torch.manual_seed(state)
        train_dense(model, Regression(), dense(steps=4), seed=seed)
        found.append([parameter.tolist() for parameter in model.parameters()])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_running_statistics_of_a_new_model_are_trained() -> None:
    model, task = Normalised(), Regression()
    before = model.statistics()
    train_dense(model, task, dense(steps=3), seed=0)
    assert all(all(modes) for modes in task.modes)
    assert model[1].num_batches_tracked == 3
    assert not any(torch.equal(*pair) for pair in zip(model.statistics(), before, strict=True))


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_first_steps_see_the_small_size(steps: int) -> None:
    """And the order of images goes on where the small ones ended."""
    task, plain = Regression(), Regression()
    model, reference = task.build_model(0), task.build_model(0)
    train_dense(model, task, dense(steps=5, progressive=ProgressiveSettings(size=4, steps=steps)), seed=0)
    small = min(steps, 5)
    assert task.sizes == [4] * small + [8] * (5 - small)
    train_dense(reference, plain, dense(steps=5), seed=0)
    assert plain.sizes == [8] * 5
    assert all(torch.equal(*pair) for pair in zip(parameters(model), parameters(reference), strict=True))


# Training on


def finetuned(**changes: Any) -> FinetunedSettings:
    return FinetunedSettings(**{"start": "dense", "steps": 12, "batch_size": 32, "lr": 0.02, "log_every": 5, **changes})


def masked(dtype: torch.dtype = torch.float32) -> nn.Module:
    return apply_masks_(Regression(dtype=dtype).build_model(0), priors(), "2:4")


def test_training_on_lowers_the_loss_under_a_mask_that_stays() -> None:
    model, task = masked(), Regression()
    batch = next(iter(task.calibration(256, 0)[0].batches))
    before = task.loss(model(batch[0]), batch).item()
    finetune(model, task, finetuned(steps=60, lr=0.05), seed=0, row="row")
    assert task.loss(model(batch[0]), batch).item() < 0.8 * before
    assert all(torch.equal(mask, priors()[name]) for name, mask in current_masks(model).items())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pruned_weights_have_no_effect_before_and_after(optimizer: str) -> None:
    x, found = torch.randn(5, 16), []
    for garbage in (0.0, 100.0):
        model = masked()
        with torch.no_grad():
            for name, mask in priors().items():
                dense_weight(model.get_submodule(name)).add_(garbage * ~mask)
        curve, _ = finetune(model, Regression(), finetuned(optimizer=optimizer, weight_decay=0.0), seed=0, row="row")
        outputs = model(x)
        assert torch.equal(fold_(copy.deepcopy(model))(x), outputs)
        found.append((outputs.tolist(), curve))
    assert found[0] == found[1]


@pytest.mark.parametrize("mask", [False, True])
def test_training_on_is_adamw_and_so_is_its_curve(mask: bool) -> None:
    kind = masked if mask else lambda dtype: Regression(dtype=dtype).build_model(0)
    model, reference = kind(torch.float64), kind(torch.float64)
    run = finetuned(min_lr=0.005, clip_grad=0.3, weight_decay=0.1, accumulate=2)
    curve, _ = finetune(model, Regression(dtype=torch.float64), run, seed=3, row="row")
    points = by_hand(run, reference, 3)
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10)
    assert CURVE_COLUMNS == ("step", "loss", "lr", "grad_norm")
    assert [point[0] for point in curve] == [0, 5, 10, 11]
    for point, expected in zip(curve, points, strict=True):
        assert point == pytest.approx(expected, rel=1e-5)


def test_running_statistics_stay_where_weights_are_trained_on() -> None:
    model, task = Normalised(), Regression()
    before = model.statistics()
    finetune(model, task, finetuned(), seed=0, row="row")
    assert all(torch.equal(*pair) for pair in zip(model.statistics(), before, strict=True))
    assert task.modes == [[True, True, False, True]] * 12


def test_weights_left_are_the_average() -> None:
    """Those of runs cut short are the states on the way: a constant rate, and the same batches."""
    states = []
    for steps in range(7):
        model = Regression().build_model(0)
        if steps:
            finetune(model, Regression(), finetuned(steps=steps, min_lr=0.02), seed=0, row="row")
        states.append([tensor.double() for tensor in parameters(model)])
    wanted = states[0]
    for state in states[1:]:
        wanted = [0.9 * mean + (1 - 0.9) * value for mean, value in zip(wanted, state, strict=True)]
    model = Regression().build_model(0)
    finetune(model, Regression(), finetuned(steps=6, min_lr=0.02, ema=0.9), seed=0, row="row")
    for found, expected in zip(parameters(model), wanted, strict=True):
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6)


# Where the dense model comes from


def source(**settings: Any) -> DenseSettings:
    return DenseSettings(row="dense", **settings)


def test_dense_model_comes_from_a_plain_file(tmp_path: Path) -> None:
    task = Regression()
    saved = task.build_model(5)
    path = tmp_path / "plain.safetensors"
    save_file(saved.state_dict(), path)
    found = obtain_dense(source(init="checkpoint", checkpoint=str(path)), task, 0)
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in found.state_dict().items())
    path.write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"plain\.safetensors"):
        obtain_dense(source(init="checkpoint", checkpoint=str(path)), task, 0)


def test_dense_file_of_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"0.weight": torch.ones(8, 16)}, path)
    with pytest.raises(CheckpointError, match=r"plain\.safetensors does not fit the model"):
        obtain_dense(source(init="checkpoint", checkpoint=str(path)), Regression(), 0)


def test_dense_model_is_trained_from_its_seed() -> None:
    task = Regression()
    found = obtain_dense(source(init="scratch", steps=3), task, 2)
    wanted = task.build_model(2)
    train_dense(wanted, task, source(init="scratch", steps=3), seed=2)
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in found.state_dict().items())
