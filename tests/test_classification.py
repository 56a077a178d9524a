"""The task: batches, losses, evaluation, and the original's summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_digits import ARGS, experiment, metrics_by_hand
from torch import Tensor, nn

from maskllm4v.data import prepare
from maskllm4v.reporting.published import ROWS
from maskllm4v.tasks.classification.task import Classification
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.sharding import BatchShard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare(experiment().data, path)
    return path


@pytest.fixture
def task(folder: Path) -> Classification:
    return Classification(experiment().task_spec(), folder)


def guesser(task: Classification, seed: int = 0) -> nn.Module:
    model = task.build_model(seed)
    nn.init.normal_(model.head.weight)  # timm starts it at zero
    return model


# Evaluation


@pytest.mark.parametrize("batch_size", [100, 898, 899, 1000])
def test_metrics_are_counted_image_by_image(batch_size: int, folder: Path) -> None:
    task = Classification(experiment(eval_batch_size=batch_size).task_spec(), folder)
    model = task.build_model(0)
    nn.init.normal_(model.head.weight)  # timm starts it at zero
    found, wanted = task.evaluate(model), metrics_by_hand(model, task)
    assert found.keys() == {*wanted, "ece"}
    assert found["top1"] == pytest.approx(wanted["top1"], abs=1e-9)
    assert found["top5"] == pytest.approx(wanted["top5"], abs=1e-9)
    assert found["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
    assert 0 < found["top1"] < found["top5"] < 100


def test_top5_of_three_classes_is_everything(folder: Path) -> None:
    class Three(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 3)

    task = Classification(experiment().task_spec(), folder)
    data = task.source
    assert isinstance(data.manifest.splits, dict)
    data.manifest.splits["test"] = [entry for entry in data.manifest.splits["test"] if entry.label < 3]
    found = task.evaluate(Three())
    assert found["top5"] == 100
    assert found["nll"] == pytest.approx(np.log(3))


def test_evaluation_leaves_training_mode(task: Classification) -> None:
    model = task.build_model(0).train()
    task.evaluate(model)
    assert not any(module.training for module in model.modules())


def test_agreement_is_counted_with_the_dense_model(task: Classification) -> None:
    model, dense = guesser(task), guesser(task, 1)
    images = task.source.images("test", np.arange(899), None)
    with torch.no_grad():
        same = (model(images).argmax(1) == dense(images).argmax(1)).sum().item()
    found = task.evaluate(model, dense=dense)
    assert found["agreement"] == pytest.approx(100 * same / 899, abs=1e-9)
    assert 0 < found["agreement"] < 100
    assert task.evaluate(model, dense=model)["agreement"] == 100
    without = {name: value for name, value in found.items() if name != "agreement"}
    assert task.evaluate(model) == without


def test_reported_split_is_a_setting_and_can_be_named(tmp_path: Path) -> None:
    held = experiment(data={"holdout": 100}, eval_split="holdout")
    prepare(held.data, tmp_path)
    task = Classification(held.task_spec(), tmp_path)
    model = guesser(task)
    for split, named in (("holdout", None), ("test", "test"), ("train", "train")):
        wanted = metrics_by_hand(model, task, split)
        assert task.evaluate(model, split=named)["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
    assert task.source.labels("holdout").shape == (100,)


def test_half_precision_of_evaluation_is_near(folder: Path) -> None:
    exact, half = (Classification(experiment(eval_amp=amp).task_spec(), folder) for amp in ("no", "bf16"))
    model = guesser(exact)
    whole, found = exact.evaluate(model), half.evaluate(model)
    assert found["nll"] != whole["nll"]
    assert found["nll"] == pytest.approx(whole["nll"], rel=0.02)


# Losses


def test_loss_is_smoothed_cross_entropy(folder: Path) -> None:
    task = Classification(experiment(label_smoothing=0.1).task_spec(), folder)
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    logs = logits.double().log_softmax(1)
    wanted = -(0.9 * logs[range(6), labels] + 0.1 * logs.mean(1)).mean()
    assert task.loss(logits, (torch.empty(0), labels)).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_the_divergence_from_the_teacher(temperature: float, task: Classification) -> None:
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    batch = torch.empty(0), torch.randint(10, (6,))  # labels are not asked
    p, q = ((x.double() / temperature).softmax(1) for x in (teacher, student))
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert task.distillation_loss(student, teacher, temperature, batch).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert task.distillation_loss(teacher, teacher, temperature, batch).item() == pytest.approx(0, abs=1e-6)


# Batches


def test_calibration_images_are_the_manifests_without_augmentation(folder: Path) -> None:
    task = Classification(experiment(shift=2).task_spec(), folder)
    (part,) = task.calibration(20, 0)
    batches = list(part.batches)
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    (chosen,) = task.source.manifest.calibration
    assert torch.equal(torch.cat([images for images, _ in batches]), task.source.images("train", chosen, None))
    assert torch.equal(torch.cat([labels for _, labels in batches]), task.source.labels("train")[chosen])


@pytest.mark.parametrize("split", ["train", "test"])
def test_seeds_take_turns_with_calibration_sets(split: str, tmp_path: Path) -> None:
    two = experiment(data={"calibration_sets": 2, "calibration_split": split})
    prepare(two.data, tmp_path)
    task = Classification(two.task_spec(), tmp_path)
    for seed, chosen in zip((0, 1), task.source.manifest.calibration, strict=True):
        images = torch.cat([images for images, _ in task.calibration(20, seed)[0].batches])
        assert torch.equal(images, task.source.images(split, chosen, None))


def test_train_batches_start_where_asked(folder: Path) -> None:
    task = Classification(experiment(shift=1).task_spec(), folder)
    whole = list(task.train_batches(seed=1, batch_size=100, steps=10))
    tail = list(task.train_batches(seed=1, batch_size=100, steps=10, start=7))
    assert task.steps_per_epoch(100) == 8
    assert len(tail) == 3
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[7:], tail, strict=True))


def test_shares_of_a_batch_make_the_whole(folder: Path) -> None:
    task = Classification(experiment(shift=1).task_spec(), folder)
    whole = list(task.train_batches(seed=1, batch_size=60, steps=2))
    shares = [
        list(task.train_batches(seed=1, batch_size=60, steps=2, shard=BatchShard.of(rank, 2, 3))) for rank in range(2)
    ]
    for step, (images, labels) in enumerate(whole):
        parts = [part for share in shares for part in share[3 * step : 3 * step + 3]]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_resized_batches_are_the_same_images(folder: Path) -> None:
    task = Classification(experiment().task_spec(), folder)
    ((images, labels),) = task.train_batches(seed=1, batch_size=60, steps=1)
    ((small, same),) = task.resized(4).train_batches(seed=1, batch_size=60, steps=1)
    assert small.shape == (60, 1, 4, 4)
    assert torch.equal(same, labels)
    halved = nn.functional.interpolate(images, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(small, halved)


def test_mixed_batches_depend_on_seed_and_step_alone(folder: Path) -> None:
    task = Classification(experiment(mixup=0.8, cutmix=1.0, label_smoothing=0.1).task_spec(), folder)
    batches = list(task.train_batches(seed=1, batch_size=50, steps=3))
    np.random.random()  # timm's mixing draws from the global generator
    again = list(task.train_batches(seed=1, batch_size=50, steps=3, start=2))
    assert torch.equal(batches[2][0], again[0][0])
    for _, targets in batches:
        assert targets.shape == (50, 10)
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 50)
    # the smoothing lies in the targets, and is not put there twice
    outputs = torch.randn(50, 10)
    wanted = -(batches[0][1] * outputs.log_softmax(1)).sum(1).mean()
    assert task.loss(outputs, batches[0]).item() == pytest.approx(wanted.item(), rel=1e-5)
    with pytest.raises(ConfigError, match="pair images, but a process gets 25 at a time"):
        next(task.train_batches(seed=1, batch_size=50, steps=1, shard=BatchShard.of(0, 2, 1)))


# The original's summary


def test_summary_has_the_originals_keys_and_counts_logits(task: Classification) -> None:
    model = task.build_model(0)
    total = sum(parameter.numel() for parameter in model.parameters())
    metrics = {"top1": 12.34567, "top5": 60.0, "nll": 1.0}
    found = task.summary(model, metrics, 5_000_000)
    assert list(found) == list(next(row.json for row in ROWS if row.json))
    assert (found["top1"], found["top1_err"]) == (12.3457, 87.6543)
    assert (found["top5"], found["top5_err"]) == (60.0, 40.0)
    assert found["param_count"] == round((total + 5_000_000) / 1e6, 2)
    assert task.summary(model, metrics, 0)["param_count"] == round(total / 1e6, 2)
    assert (found["model"], found["img_size"]) == ("VisionTransformer", ARGS["img_size"])
