"""Squared errors against a loop in float64; the judge's accuracy and distances; pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from small_diffusion import JUDGE, alphas, dit, experiment, open_small, with_outputs

from maskllm4v.checkpoints.masks import save_dense
from maskllm4v.config import DenseSettings
from maskllm4v.data import prepare
from maskllm4v.runs.paths import judge_file
from maskllm4v.tasks.classification.task import Classification
from maskllm4v.tasks.diffusion.judge import Judge, classifier, distances
from maskllm4v.tasks.diffusion.task import Diffusion
from maskllm4v.training.dense import obtain_dense, train_judge
from maskllm4v.utils.errors import CheckpointError, ConfigError
from maskllm4v.utils.rng import generator

SMALL = {"test_fraction": 0.05, "name": "digits", "source": "digits", "calibration": 30}  # 90 images to test on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare(experiment(data=SMALL).data, path)
    return path


def opened(folder: Path, **sections: Any) -> Diffusion:
    return open_small(folder, data=SMALL, **sections)


# Squared errors


def errors_by_hand(task: Diffusion, model: nn.Module, dense: nn.Module, timesteps: list[int]) -> dict[str, float]:
    """One image at a time: all that are counted, at each timestep."""
    labels = task.data.labels("test")
    chosen = sorted(generator(0, "evaluated").permutation(90)[:50])
    found: dict[str, float] = {}
    for t in timesteps:
        eps, other = [], []
        for i in chosen:
            image = task.data.images("test", np.array([i]), None).double()
            clean = (image * task.data.std + task.data.mean) * 2 - 1
            noise = generator(0, "evaluation", int(i), t).standard_normal((1, 1, 8, 8))
            noise = torch.from_numpy(noise)
            inputs = (alphas()[t] ** 0.5 * clean + (1 - alphas()[t]) ** 0.5 * noise).float()
            with torch.no_grad():
                mine, theirs = (m(inputs, torch.tensor([t]), labels[i : i + 1]).sample.double() for m in (model, dense))
            eps.append((mine[:, :1] - noise).square().mean().item())
            other.append((mine - theirs).square().mean().item())
        found |= {f"eps_mse/t{t:04d}": np.mean(eps), f"dense_mse/t{t:04d}": np.mean(other)}
    for name in ("eps_mse", "dense_mse"):
        found[name] = np.mean([found[f"{name}/t{t:04d}"] for t in timesteps])
    return found


@pytest.mark.parametrize("batch_size", [7, 50, 300])
@pytest.mark.parametrize("out_channels", [1, 2])
def test_errors_are_those_of_a_loop(out_channels: int, batch_size: int, folder: Path) -> None:
    sections = with_outputs(out_channels)
    task = opened(folder, **sections, task={"eval_batch_size": batch_size}, evaluation={"timesteps": 3})
    model, dense = (dit(seed, out_channels=out_channels) for seed in (0, 1))
    wanted = errors_by_hand(task, model, dense, [166, 500, 833])
    assert task.evaluate(model, dense) == pytest.approx(wanted, rel=1e-4)
    assert task.evaluate(model) == pytest.approx({k: v for k, v in wanted.items() if "dense" not in k}, rel=1e-4)
    assert task.score(model, "test") == pytest.approx(-wanted["eps_mse"], rel=1e-4)


@pytest.mark.parametrize(("count", "timesteps"), [(1, [500]), (2, [250, 750]), (10, list(range(50, 1000, 100)))])
def test_timesteps_are_the_middles_of_equal_parts(count: int, timesteps: list[int], folder: Path) -> None:
    found = opened(folder, evaluation={"timesteps": count}).evaluate(dit())
    assert list(found) == ["eps_mse", *(f"eps_mse/t{t:04d}" for t in timesteps)]
    assert found["eps_mse"] == pytest.approx(np.mean([value for name, value in found.items() if "/" in name]))


def test_errors_of_all_images_are_counted_with_zero(folder: Path) -> None:
    every, ninety, fifty = (opened(folder, evaluation={"images": n}).evaluate(dit()) for n in (0, 90, 50))
    assert every == ninety
    assert every != fifty


def test_dense_model_agrees_with_itself(folder: Path) -> None:
    found = opened(folder).evaluate(dit(), dit())
    assert [value for name, value in found.items() if name.startswith("dense_mse")] == [0.0] * 3


def test_who_says_nothing_is_off_by_the_noise(folder: Path) -> None:
    model = dit()
    for parameter in model.proj_out_2.parameters():
        nn.init.zeros_(parameter)
    assert opened(folder, evaluation={"images": 0}).evaluate(model)["eps_mse"] == pytest.approx(1, abs=0.05)


def test_half_precision_of_evaluation_is_near(folder: Path) -> None:
    whole, half = (opened(folder, task={"eval_amp": amp}).evaluate(dit(), dit(1)) for amp in ("no", "bf16"))
    assert half["eps_mse"] != whole["eps_mse"]
    assert half == pytest.approx(whole, rel=0.05)


# The judge


@pytest.fixture(scope="module")
def judged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained judge in its place."""
    path, judge = tmp_path_factory.mktemp("judged"), opened(folder, task={"judge": JUDGE}).judge
    assert judge is not None
    save_dense(path / judge_file("dense"), train_judge(judge, 0), judge.model)
    return path


@pytest.fixture
def here(judged: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(judged)
    return judged


def feed(task: Diffusion, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> list[Tensor]:
    """Let the sampler give images, by number; which labels it was asked for."""
    asked: list[Tensor] = []

    def sampler(model: nn.Module, labels: Tensor, numbers: list[int], **_: Any) -> Tensor:
        asked.append(labels)
        return images[numbers]

    monkeypatch.setattr(task, "sampler", lambda _: sampler)
    return asked


def judging(folder: Path, samples: int, **evaluation: Any) -> tuple[Diffusion, Judge]:
    task = opened(folder, task={"judge": JUDGE, "eval_batch_size": 37}, evaluation={"samples": samples, **evaluation})
    assert task.settings.judge is not None
    return task, Judge(classifier(task.settings.judge, task.spec, folder), judge_file("dense"))


def test_images(task: Diffusion) -> tuple[Tensor, Tensor]:
    images = task.data.images("test", np.arange(90), None)
    return (images * task.data.std + task.data.mean) * 2 - 1, task.data.labels("test")


test_images.__test__ = False  # type: ignore[attr-defined]


def test_real_images_as_samples(here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the classes asked for: as many right as the judge gets of them, and no distance."""
    task, judge = judging(folder, 90)
    images, labels = test_images(task)
    of_class = [torch.nonzero(labels == label).flatten() for label in range(10)]
    chosen = torch.stack([of_class[i % 10][i // 10 % len(of_class[i % 10])] for i in range(90)])
    asked = feed(task, monkeypatch, images[chosen])
    with torch.no_grad():
        predicted = judge.model(judge.as_data(images[chosen])).argmax(1)
    found = task.evaluate(dit())
    assert torch.equal(torch.cat(asked), torch.arange(90) % 10)
    assert [len(part) for part in asked] == [37, 37, 16]
    assert found["accuracy"] == pytest.approx(100 * (predicted == labels[chosen]).double().mean().item())
    assert 50 < found["accuracy"] < 100
    assert found["judge_accuracy"] == judge.task.evaluate(judge.model)["top1"]
    assert set(found) == {"eps_mse", "eps_mse/t0250", "eps_mse/t0750", "accuracy", "fd", "kd", "judge_accuracy"}
    assert "judge_accuracy" not in task.evaluate(dit(), dit(1))


def test_judge_sees_samples_as_it_saw_its_data(here: Path, folder: Path) -> None:
    task, judge = judging(folder, 90)
    images, _ = test_images(task)
    data = judge.task.source.images("test", np.arange(90), None)
    torch.testing.assert_close(judge.as_data(images), data)
    features, logits = judge.features(data)
    assert features.shape == (90, 16)
    torch.testing.assert_close(logits, judge.model(data))
    assert judge.as_data(images.repeat_interleave(2, 2).repeat_interleave(2, 3)).shape == data.shape
    torch.testing.assert_close(judge.real("test", 40), features)


def test_distances_of_real_images_and_of_noise(here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = judging(folder, 90)
    images, _ = test_images(task)
    feed(task, monkeypatch, images)
    same = task.evaluate(dit())
    feed(task, monkeypatch, torch.randn(90, 1, 8, 8).sign())
    noise = task.evaluate(dit())
    assert abs(same["fd"]) < 1e-3 * noise["fd"]
    assert same["kd"] < 0 < noise["kd"]  # subsets of nine scatter widely


def test_more_samples_than_images(here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the samples, as subsets of the kernel distance, would be more than there are images."""
    task, _ = judging(folder, 1000, images=1)
    feed(task, monkeypatch, torch.randn(1000, 1, 8, 8))
    assert np.isfinite(task.evaluate(dit())["kd"])


def test_samples_come_from_the_model(here: Path, folder: Path) -> None:
    task, _ = judging(folder, 4, images=1)
    first, again, other = (task.evaluate(model) for model in (dit(), dit(), dit(1)))
    assert first == again
    assert first["fd"] != other["fd"]


def test_missing_judge_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = opened(folder, task={"judge": JUDGE}, evaluation={"samples": 4})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"artifacts/dense/judge\.safetensors is missing"):
        task.evaluate(dit())


def test_judge_is_trained_as_a_dense_model_is(here: Path, folder: Path) -> None:
    """To the bit, with the same settings; on the same data."""
    task = opened(folder, task={"judge": {**JUDGE, "task": {"label_smoothing": 0.1}}})
    judge = task.judge
    assert judge is not None
    settings = DenseSettings(row="judge", init="scratch", **dict(judge.settings))
    wanted = obtain_dense(settings, judge.task, 1).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in train_judge(judge, 1).state_dict().items())
    assert judge.settings.steps == JUDGE["training"]["steps"]
    assert judge.task.data_digest == task.data_digest
    assert isinstance(judge.task, Classification)
    assert judge.task.settings.label_smoothing == 0.1
    assert judge.model == judge.task.model.name == JUDGE["model"]["name"]


def test_samples_are_not_judged_without_weights(folder: Path) -> None:
    settings = experiment(data=SMALL, task={"judge": JUDGE}, evaluation={"samples": 4, "images": 1})
    with pytest.raises(ConfigError, match=r"evaluation\.samples is 4, but the task was opened without weights of task"):
        Diffusion(settings.task_spec(), folder).evaluate(dit())


def test_no_judge_where_none_is_wanted(folder: Path) -> None:
    assert opened(folder).judge is None


def features(seed: int, count: int, shift: float = 0.0) -> Tensor:
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) @ mix + shift


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    xx, yy, xy = ((p @ q.T / 6 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    m, n = len(x), len(y)
    return float((xx.sum() - xx.trace()) / (m * m - m) + (yy.sum() - yy.trace()) / (n * n - n) - 2 * xy.mean())


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_distances_are_the_papers(shift: float) -> None:
    """Heusel et al. 2017; Bińkowski et al. 2018 on all samples at once, up to the error of 100 subsets."""
    real, made = features(0, 300), features(1, 200, shift)
    x, y = real.double().numpy(), made.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    frechet = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    rng = np.random.default_rng(0)
    subsets = [kernel_distance(rng.permutation(x)[:20], rng.permutation(y)[:20]) for _ in range(100)]
    state = torch.get_rng_state()
    found = distances(real, made)
    assert torch.equal(torch.get_rng_state(), state)
    assert found["fd"] == pytest.approx(frechet, rel=1e-4)
    assert found["kd"] == pytest.approx(kernel_distance(x, y), abs=5 * np.std(subsets) / 10)
    assert distances(real, made) == found


def test_distance_of_a_set_to_itself() -> None:
    real, far = features(0, 300), features(1, 300, 3.0)
    same, other = distances(real, real), distances(real, far)
    assert abs(same["fd"]) < 1e-3 < 1 < other["fd"]
    assert abs(same["kd"]) < 0.02 * other["kd"]


# Pictures


class Silent(nn.Module):
    """Says that there is no noise; notes what it saw."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level, self.seen = level, []

    def forward(self, inputs: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.seen.append((inputs, class_labels))
        return (torch.full_like(inputs, self.level),)


def test_pictures_of_all_models_start_from_the_same_noise(folder: Path) -> None:
    task, models = opened(folder, evaluation={"guidance": 1.0}), [Silent(0.0), Silent(1.0)]
    found = [task.pictures(model) for model in models]
    assert [set(one) for one in found] == [{"samples"}] * 2
    assert found[0]["samples"].shape == (17, 17)
    assert found[0]["samples"].dtype == np.uint8
    assert torch.equal(models[0].seen[0][0], models[1].seen[0][0])
    assert not np.array_equal(found[0]["samples"], found[1]["samples"])
    assert models[0].seen[0][1].tolist() == [1, 2, 3]
    assert (found[0]["samples"][8:, 8:] == 128).all()  # three of four places
