"""How tasks deploy their models: examples that need no data, and modules that compute what forward does."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_digits
import torch

from maskllm4v.tasks.base import ExportableModel
from maskllm4v.tasks.classification.task import Classification
from maskllm4v.tasks.diffusion.noising import NoisyBatch


def assert_same(one: ExportableModel, other: ExportableModel) -> None:
    assert list(one.inputs) == list(other.inputs)
    assert all(torch.equal(x, other.inputs[name]) for name, x in one.inputs.items())


def test_classification(tmp_path: Path) -> None:
    task = Classification(small_digits.experiment(), tmp_path / "nothing here")
    model = task.build_model(0)
    exportable = task.exportable(model, 3)
    assert {name: (x.shape, x.dtype) for name, x in exportable.inputs.items()} == {
        "images": ((3, 1, 8, 8), torch.float32)
    }
    assert exportable.output == "logits"
    assert_same(exportable, task.exportable(model, 3))
    images = exportable.inputs["images"]
    assert torch.equal(exportable.module(images), task.forward(model, (images, torch.arange(3))))
    assert exportable.module(images).shape == (3, 10)


def test_diffusion(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from small_diffusion import awake, open_small

    task = open_small(tmp_path / "nothing here")
    model = awake(task.build_model(0))
    exportable = task.exportable(model, 3)
    assert {name: (x.shape, x.dtype) for name, x in exportable.inputs.items()} == {
        "sample": ((3, 1, 8, 8), torch.float32),
        "timestep": ((3,), torch.int64),
        "class_labels": ((3,), torch.int64),
    }
    assert exportable.output == "noise_pred"
    assert_same(exportable, task.exportable(model, 3))
    many = task.exportable(model, 500).inputs
    assert many["timestep"].unique().numel() > 300
    assert sorted(many["class_labels"].unique()) == list(range(11))  # the last one stands for none
    sample, timestep, labels = exportable.inputs.values()
    wanted = task.forward(model, NoisyBatch(sample, timestep, labels, sample))
    assert torch.equal(exportable.module(sample, timestep, labels), wanted)
