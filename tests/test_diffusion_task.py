"""The task of diffusion: batches, calibration, losses, and samples in the place of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from small_diffusion import (
    LINEAR,
    alphas,
    assert_same_images,
    clean,
    dit,
    experiment,
    open_small,
    parts,
    pixels,
    same,
    with_outputs,
)

from maskllm4v import prune
from maskllm4v.data import prepare
from maskllm4v.sparsity.calibration import names_by_part
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.tasks.base import open_task, train_mode
from maskllm4v.tasks.diffusion.noising import NoisyBatch
from maskllm4v.tasks.diffusion.task import Diffusion
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.sharding import BatchShard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare(experiment().data, path)
    return path


@pytest.fixture
def task(folder: Path) -> Diffusion:
    return open_small(folder)


# The task itself


def test_task_is_opened_by_its_name(folder: Path) -> None:
    task = open_task(experiment().task_spec(), folder)
    assert isinstance(task, Diffusion)
    assert (task.shape, task.classes, task.schedule) == ((1, 8, 8), 10, LINEAR)
    assert len(task.data_digest) == 64


def test_another_number_of_classes_is_an_error(folder: Path) -> None:
    task = open_small(folder, model={"args": {"in_channels": 1, "sample_size": 8, "num_embeds_ada_norm": 9}})
    with pytest.raises(ConfigError, match=r"num_embeds_ada_norm is 9, but the data has 10 classes"):
        _ = task.data
    with pytest.raises(ConfigError, match="is 1000, but"):
        _ = open_small(folder, model={"args": {"in_channels": 1, "sample_size": 8}}).data_digest


def test_what_is_not_for_diffusion(task: Diffusion) -> None:
    with pytest.raises(ConfigError, match=r"dense\.init is 'pretrained'"):
        task.build_model(0, pretrained=True)
    with pytest.raises(ConfigError, match=r"dense\.progressive is not for diffusion"):
        task.resized(4)
    assert task.summary(dit(), {"eps_mse": 1.0}, 0) == {}


def test_labels_are_never_dropped_by_the_model(task: Diffusion) -> None:
    model = dit().train()
    train_mode(task, model)
    assert not any(module.training for module in model.modules())
    (batch,) = task.train_batches(seed=0, batch_size=200, steps=1)
    assert torch.equal(task.forward(model, batch), task.forward(model, batch))
    model.train()
    assert not torch.equal(task.forward(model, batch), task.forward(model, batch))  # diffusers drops some


# Batches


def test_batches_are_noised_images_of_the_training_split(task: Diffusion) -> None:
    (batch,) = task.train_batches(seed=3, batch_size=60, steps=1)
    assert batch.inputs.shape == batch.noise.shape == (60, 1, 8, 8)
    assert (batch.inputs.dtype, batch.timesteps.dtype, batch.labels.dtype) == (torch.float32, torch.int64, torch.int64)
    found, every = clean(batch), pixels(task, "train", np.arange(898))
    certain = alphas()[batch.timesteps] > 0.01
    nearest = (every[:, None] - found[certain][None]).abs().amax((2, 3, 4)).min(0)
    assert certain.sum() > 20
    assert (nearest.values < 1e-3).all()
    assert nearest.indices.unique().numel() == certain.sum()
    labels = task.data.labels("train")[nearest.indices]
    shown = batch.labels[certain] != 10
    assert torch.equal(batch.labels[certain][shown], labels[shown])
    assert (every.min().item(), every.max().item()) == pytest.approx((-1, 1))


def test_a_tenth_of_the_labels_is_hidden(task: Diffusion, folder: Path) -> None:
    batches = list(task.train_batches(seed=0, batch_size=400, steps=10))
    hidden = torch.cat([batch.labels for batch in batches]) == 10
    assert 0.075 < hidden.double().mean() < 0.125
    timesteps = torch.cat([batch.timesteps for batch in batches]).double()
    assert timesteps.mean().item() == pytest.approx(499.5, abs=25)
    never = open_small(folder, task={"label_dropout": 0.0}, evaluation={"guidance": 1.0})
    assert all(batch.labels.max() < 10 for batch in never.train_batches(seed=0, batch_size=400, steps=3))


def test_batches_depend_on_seed_and_step_alone(task: Diffusion, folder: Path) -> None:
    whole = list(task.train_batches(seed=1, batch_size=100, steps=10))
    torch.randn(3)
    tail = list(open_small(folder).train_batches(seed=1, batch_size=100, steps=12, start=7))
    assert same(whole[7:], tail[:3])
    other = list(task.train_batches(seed=2, batch_size=100, steps=1))
    assert not torch.equal(whole[0].noise, other[0].noise)
    assert not torch.equal(whole[0].noise, whole[1].noise)
    assert task.steps_per_epoch(100) == 8


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_shares_of_a_batch_make_the_whole(processes: int, micro_batches: int, task: Diffusion) -> None:
    whole = list(task.train_batches(seed=1, batch_size=40, steps=3, start=1))
    shares = [
        list(
            task.train_batches(
                seed=1, batch_size=40, steps=3, start=1, shard=BatchShard.of(rank, processes, micro_batches)
            )
        )
        for rank in range(processes)
    ]
    for step, wanted in enumerate(whole):
        parts = [part for own in shares for part in own[step * micro_batches : (step + 1) * micro_batches]]
        assert len(parts) == processes * micro_batches
        assert same([[torch.cat(values) for values in zip(*parts, strict=True)]], [wanted])


# Calibration


def test_modulation_is_calibrated_on_conditions_of_its_own(task: Diffusion) -> None:
    layers = prunable_linears(dit(), exclude=task.model.excluded_layers)
    first, second = names_by_part(layers, parts(task))
    assert first == ["transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear"]
    assert len(second) == 2 * 6
    assert not any("emb" in name or "norm1" in name for name in second)
    assert [part.independent for part in parts(task)] == [True, False]


def test_conditions_are_stratified_and_labels_balanced(task: Diffusion) -> None:
    batches = list(parts(task)[0].batches)
    assert [len(timesteps) for timesteps, _ in batches] == [20, 20, 20, 10]
    timesteps, labels = (torch.cat(values) for values in zip(*batches, strict=True))
    assert sorted((timesteps * 70 // 1000).tolist()) != timesteps.tolist()
    for place, timestep in enumerate(sorted(timesteps.tolist())):
        assert place * 1000 / 70 - 1 < timestep < (place + 1) * 1000 / 70
    counts = labels.bincount(minlength=11)
    assert 0 < counts[10] < 20
    assert counts[:10].max() <= 7
    assert same(batches, list(parts(task)[0].batches))
    assert not same(batches, list(parts(task, seed=1)[0].batches))


def test_calibration_images_are_the_manifests(task: Diffusion) -> None:
    batches = list(parts(task)[1].batches)
    assert [len(batch.labels) for batch in batches] == [20, 10]
    whole = NoisyBatch(*(torch.cat(values) for values in zip(*batches, strict=True)))
    (chosen,) = task.data.manifest.calibration
    assert_same_images(clean(whole), pixels(task, "train", chosen), whole)
    shown = whole.labels != 10
    assert torch.equal(whole.labels[shown], task.data.labels("train")[chosen][shown])
    for place, timestep in enumerate(sorted(whole.timesteps.tolist())):
        assert place * 1000 / 30 - 1 < timestep < (place + 1) * 1000 / 30
    finer = list(parts(task, batch_size=7)[1].batches)
    assert same([[torch.cat(values) for values in zip(*finer, strict=True)]], [whole])


@pytest.mark.parametrize("adaln", [True, False])
def test_pruning_takes_the_layers_that_the_settings_name(adaln: bool, folder: Path) -> None:
    task = open_small(folder, model={"adaln": adaln})
    model = dit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = prune(
        model,
        "sparsegpt",
        calibration=task.calibration(20, 0),
        exclude=task.model.excluded_layers,
        update_weights=True,
    )
    assert len(masks) == 2 * (6 + adaln)
    assert any(name.endswith("norm1.linear") for name in masks) is adaln
    changed = {name for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {f"{name}.weight" for name in masks}


# Losses


@pytest.mark.parametrize("out_channels", [1, 2])
def test_loss_is_of_the_noise_and_distillation_of_everything(out_channels: int, folder: Path) -> None:
    task = open_small(folder, **with_outputs(out_channels))
    (batch,) = task.train_batches(seed=0, batch_size=30, steps=1)
    model, dense = (dit(seed, out_channels=out_channels) for seed in (0, 1))
    with torch.no_grad():
        outputs, teacher = task.forward(model, batch), task.forward(dense, batch)
    assert outputs.shape == (30, out_channels, 8, 8)
    wanted = (outputs[:, :1].double() - batch.noise.double()).square().mean()
    assert task.loss(outputs, batch).item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted = (outputs.double() - teacher.double()).square().mean()
    for temperature in (1.0, 3.0):
        found = task.distillation_loss(outputs, teacher, temperature, batch)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    if out_channels == 2:
        other = outputs.clone()
        other[:, 1] += 1
        assert torch.equal(task.loss(other, batch), task.loss(outputs, batch))
        of_all = [task.distillation_loss(found, teacher, 1.0, batch) for found in (other, outputs)]
        assert of_all[0] != of_all[1]
    assert task.sampler(task.settings.bank).learned_sigma is (out_channels == 2)
