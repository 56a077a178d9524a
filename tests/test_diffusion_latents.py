"""The task in an autoencoder's latent space, on image folders: what is encoded, and with which noise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")

from images import draw_folder
from small_diffusion import ARGS, alphas, awake, dit, experiment, make_autoencoder, open_small, raw

from maskllm4v.config import parse_experiment
from maskllm4v.data import prepare
from maskllm4v.tasks.diffusion.noising import NoisyBatch
from maskllm4v.tasks.diffusion.task import Diffusion
from maskllm4v.utils.errors import ConfigError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cats and dogs, their manifest, and an autoencoder."""
    path = tmp_path_factory.mktemp("latents")
    draw_folder(path / "images")
    make_autoencoder(path / "vae", 0.7)
    prepare(parse_experiment(raw(**sections(path))).data, path / "data")
    return path


def sections(place: Path, **task: Any) -> dict[str, Any]:
    args = {**ARGS, "in_channels": 4, "out_channels": 8, "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 2}
    bank = {"samples": 6, "sampler": "ddim", "steps": 2}
    data = {"name": "pets", "source": "folder", "root": str(place / "images"), "calibration": 3}
    evaluation = {"images": 0, "grid": [0, 1, 1]}
    task = {"vae": str(place / "vae"), "bank": bank, "eval_batch_size": 3, **task}
    dense = {"init": "checkpoint", "checkpoint": "dense.safetensors"}
    return {"data": data, "task": task, "model": {"args": args}, "dense": dense, "evaluation": evaluation}


def open_latent(place: Path, **task: Any) -> Diffusion:
    return open_small(place / "data", **sections(place, **task))


def latent_ranges(task: Diffusion, split: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each image's latents."""
    data = task.data
    images = data.images(split, np.arange(len(data.manifest.splits[split])), None)
    pixels = (images * data.std + data.mean) * 2 - 1
    space: Any = task.space
    with torch.no_grad():
        found = space.vae.encode(pixels).latent_dist
    return found.mean * 0.7, found.std * 0.7


def test_images_are_as_large_as_the_autoencoder_wants_them(place: Path) -> None:
    task = open_latent(place)
    images = task.data.images("train", np.arange(3), None)
    assert images.shape == (3, 3, 16, 16)
    pixels = images * task.data.std + task.data.mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert task.shape == (4, 4, 4)


def test_batches_are_noised_draws_of_the_encoder(place: Path) -> None:
    task = open_latent(place, label_dropout=0.0)
    mean, std = latent_ranges(task, "train")
    draws = []
    for batch in task.train_batches(seed=0, batch_size=11, steps=40):
        alpha = torch.from_numpy(alphas())[batch.timesteps].view(-1, 1, 1, 1)
        clean = ((batch.inputs - (1 - alpha).sqrt() * batch.noise) / alpha.sqrt())[batch.timesteps < 300]
        for sample, label in zip(clean.float(), batch.labels[batch.timesteps < 300], strict=True):
            of_class = task.data.labels("train") == label
            standard = (sample - mean[of_class]) / std[of_class]
            draws.append(standard[standard.square().mean((1, 2, 3)).argmin()])
    found = torch.stack(draws)
    assert len(found) > 80
    assert found.mean().item() == pytest.approx(0, abs=0.1)
    assert found.std().item() == pytest.approx(1, abs=0.15)


def test_calibration_and_evaluation_draw_by_number(place: Path) -> None:
    whole, one_by_one = (open_latent(place, eval_batch_size=size) for size in (4, 1))
    batches = list(whole.calibration(3, 0)[1].batches), list(whole.calibration(1, 0)[1].batches)
    found = (NoisyBatch(*(torch.cat(values) for values in zip(*several, strict=True))) for several in batches)
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)
    model = awake(whole.build_model(0))
    found = (task.evaluate(model) for task in (whole, one_by_one))
    first, second = found
    assert first == pytest.approx(second, rel=1e-5)


def test_samples_are_latents_and_evaluation_stays_with_images(place: Path) -> None:
    task = open_latent(place)
    dense, model = (awake(task.build_model(0), seed) for seed in (0, 1))
    made = task.generated(dense, 0)
    assert made.source.images("train", np.arange(6), None).shape == (6, 4, 4, 4)
    (batch,) = made.train_batches(seed=0, batch_size=6, steps=1)
    assert batch.inputs.shape == (6, 4, 4, 4)
    assert made.evaluate(model, dense) == task.evaluate(model, dense)
    assert made.score(model, "train") == task.score(model, "train") < 0


def test_pictures_are_decoded(place: Path) -> None:
    task = open_latent(place)
    assert task.pictures(awake(task.build_model(0)))["samples"].shape == (33, 33, 3)


# What does not fit


def test_autoencoder_with_other_channels(place: Path) -> None:
    raw_sections = sections(place)
    raw_sections["model"]["args"] |= {"in_channels": 3, "out_channels": 6}
    with pytest.raises(ConfigError, match=r"model\.args\.in_channels is 3, but .*vae makes 4"):
        _ = open_small(place / "data", **raw_sections).space


def test_images_of_another_size_or_channels(place: Path) -> None:
    task = open_latent(place)
    noise = np.zeros((2, 4, 4, 4), np.float32)
    assert task.clean(torch.zeros(2, 3, 16, 16), noise).shape == noise.shape
    for shape, said in (((3, 32, 32), "3×32×32"), ((3, 16, 20), "3×16×20"), ((1, 16, 16), "1×16×16")):
        with pytest.raises(ConfigError, match=f"^the images are {said}, but the model is for 3×16×16$"):
            task.clean(torch.zeros(2, *shape), noise)


@pytest.mark.parametrize(("args", "said"), [({"sample_size": 16}, "1×16×16"), ({"in_channels": 3}, "3×8×8")])
def test_pixels_of_another_size_or_channels(args: dict[str, int], said: str, tmp_path: Path) -> None:
    """The digits have one size, whatever the model's."""
    prepare(experiment().data, tmp_path)
    task = open_small(tmp_path, model={"args": {**ARGS, **args}})
    expected = f"^the images are 1×8×8, but the model is for {said}$"
    with pytest.raises(ConfigError, match=expected):
        next(task.train_batches(seed=0, batch_size=4, steps=1))
    with pytest.raises(ConfigError, match=expected):
        task.evaluate(dit())


# What the data are


def test_digest_is_of_the_autoencoder_too(place: Path, tmp_path: Path) -> None:
    def digest() -> str:
        return open_latent(place, vae=str(tmp_path / "vae")).data_digest

    shutil.copytree(place / "vae", tmp_path / "vae")
    first = digest()
    assert first == open_latent(place).data_digest == digest()  # wherever it lies
    assert first != open_latent(place).data.manifest.digest
    config, weights = (tmp_path / "vae" / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
    config.write_text(config.read_text().replace("0.7", "0.6"))
    second = digest()
    state = load_file(weights)
    save_file({**state, "decoder.conv_in.bias": state["decoder.conv_in.bias"] + 1}, weights)
    assert len({first, second, digest()}) == 3


def test_digest_of_pixels_is_the_manifests(tmp_path: Path) -> None:
    prepare(experiment().data, tmp_path)
    task = open_small(tmp_path)
    assert task.data_digest == task.data.manifest.digest
