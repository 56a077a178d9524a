"""How tasks deploy their models: examples that need no data, and modules that compute what forward does."""

from __future__ import annotations

import pytest
import small_digits
import torch

from maskllm4v.config import TaskSpec
from maskllm4v.tasks.base import ExportableModel, open_task
from maskllm4v.tasks.classification.task import Classification
from maskllm4v.tasks.diffusion.noising import NoisyBatch
from maskllm4v.utils.errors import ConfigError


def assert_same(one: ExportableModel, other: ExportableModel) -> None:
    assert list(one.inputs) == list(other.inputs)
    assert all(torch.equal(x, other.inputs[name]) for name, x in one.inputs.items())


def test_classification() -> None:
    settings = small_digits.experiment()
    task = Classification(TaskSpec(settings.task, settings.model))
    model = task.build_model(0)
    exportable = task.exportable(model, 3)
    assert {name: (x.shape, x.dtype) for name, x in exportable.inputs.items()} == {
        "images": ((3, 1, 8, 8), torch.float32)
    }
    assert exportable.outputs == ("logits",)
    assert_same(exportable, task.exportable(model, 3))
    images = exportable.inputs["images"]
    assert torch.equal(exportable.module(images), task.forward(model, (images, torch.arange(3))))
    assert exportable.module(images).shape == (3, 10)


def test_diffusion() -> None:
    pytest.importorskip("diffusers")
    from small_diffusion import awake, experiment

    settings = experiment()
    task = open_task(TaskSpec(settings.task, settings.model, settings.evaluation))
    model = awake(task.build_model(0))
    exportable = task.exportable(model, 3)
    assert {name: (x.shape, x.dtype) for name, x in exportable.inputs.items()} == {
        "sample": ((3, 1, 8, 8), torch.float32),
        "timestep": ((3,), torch.int64),
        "class_labels": ((3,), torch.int64),
    }
    assert exportable.outputs == ("noise_pred",)
    assert_same(exportable, task.exportable(model, 3))
    many = task.exportable(model, 500).inputs
    assert many["timestep"].unique().numel() > 300
    assert sorted(many["class_labels"].unique()) == list(range(11))  # the last one stands for none
    sample, timestep, labels = exportable.inputs.values()
    wanted = task.forward(model, NoisyBatch(sample, timestep, labels, sample))
    assert torch.equal(exportable.module(sample, timestep, labels), wanted)


def test_data_are_missed_when_they_are_asked_for() -> None:
    settings = small_digits.experiment()
    task = open_task(TaskSpec(settings.task, settings.model))
    with pytest.raises(ConfigError, match="task 'classification' was opened without data"):
        task.steps_per_epoch(8)
