"""Masks that are learned from a teacher: who is asked, and what for."""

from __future__ import annotations

import copy

import pytest
import torch
from regression import Noisy, Regression, column, learnable, settings, trained

from maskllm4v.training.mask_learning import learn_masks


def test_full_distillation_asks_the_dense_model_and_no_label() -> None:
    task = Regression()
    dense = copy.deepcopy(task.build_model(0)).eval()
    trained(task, distillation=1.0, distillation_temperature=3.0)
    assert task.losses == 0
    assert len(task.teachers) == 12
    for features, outputs, teacher, temperature in task.teachers:
        assert torch.equal(teacher, dense(features).detach())
        assert not torch.equal(outputs, teacher)
        assert temperature == 3.0


def test_teacher_that_is_given_is_asked() -> None:
    task = Regression()
    teacher = Noisy().eval()
    model = learnable(task.build_model(0))
    learn_masks(model, task, settings(distillation=1.0), teacher=teacher)
    assert len(task.teachers) == 12
    for features, _, found, _ in task.teachers:
        assert torch.equal(found, teacher(features).detach())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_no_distillation_asks_no_teacher() -> None:
    task = Regression()
    trained(task)
    assert (task.losses, task.teachers) == (12, [])


def test_half_distillation_is_the_mean_of_both() -> None:
    losses = [column(trained(distillation=share, steps=1)[1], "loss")[0] for share in (0.0, 0.25, 1.0)]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-6)
    assert losses[0] != losses[2]


def test_distillation_brings_the_outputs_to_the_teachers() -> None:
    task = Regression()
    _, learned = trained(task, distillation=1.0, steps=150, lr=0.1, batch_size=64, log_every=10)
    losses = column(learned, "loss")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
