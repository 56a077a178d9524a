"""What a model works on: pixels, latents of an autoencoder, samples in the place of data; and pictures of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL
from small_diffusion import make_autoencoder

from maskllm4v.tasks.diffusion.images import CHUNK, GeneratedDataset, PixelSpace, VAELatents, picture
from maskllm4v.utils.errors import CheckpointError

CPU = torch.device("cpu")
SCALE = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_autoencoder(tmp_path_factory.mktemp("vae"), SCALE)


@pytest.fixture(scope="module")
def latents(folder: Path) -> VAELatents:
    return VAELatents(folder, CPU)


def colours(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


# Pixels and latents


def test_pixels_are_what_they_are() -> None:
    images = torch.randn(2, 1, 4, 4)
    space = PixelSpace()
    assert space.factor == 1
    assert space.encode(images, torch.randn(2, 1, 4, 4)) is images
    assert torch.equal(space.decode(images), images.clamp(-1, 1))


@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 3])
def test_latents_are_mean_and_spread(count: int, latents: VAELatents) -> None:
    images, noise = colours(count), torch.randn(count, 4, 4, 4)
    assert latents.factor == 4
    with torch.no_grad():
        mean, log_variance = latents.vae.quant_conv(latents.vae.encoder(images)).double().chunk(2, 1)
    wanted = (mean + (log_variance / 2).exp() * noise.double()) * SCALE
    found = latents.encode(images, noise)
    assert found.shape == (count, 4, 4, 4)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert (found - latents.encode(images, torch.zeros_like(noise))).abs().max() > 0.1


def test_decoded_images_are_scaled_back_and_clamped(latents: VAELatents) -> None:
    samples = 10 * torch.randn(CHUNK + 1, 4, 4, 4)
    with torch.no_grad():
        plain = torch.cat([latents.vae.decode(sample[None] / SCALE).sample for sample in samples])
    found = latents.decode(samples)
    assert found.shape == (CHUNK + 1, 3, 16, 16)
    assert plain.abs().max() > 1
    torch.testing.assert_close(found, plain.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_autoencoder_is_not_trained(latents: VAELatents) -> None:
    assert not any(parameter.requires_grad for parameter in latents.vae.parameters())
    assert not any(module.training for module in latents.vae.modules())
    images = colours(1).requires_grad_()
    assert not latents.encode(images, torch.zeros(1, 4, 4, 4)).requires_grad


@pytest.mark.parametrize("kind", ["missing", "empty", "no weights", "damaged"])
def test_folder_without_an_autoencoder(kind: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "vae"
    if kind != "missing":
        path.mkdir()
    if kind in ("no weights", "damaged"):
        (path / "config.json").write_text((folder / "config.json").read_text())
    if kind == "damaged":
        (path / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError) as caught:
        VAELatents(path, CPU)
    assert str(caught.value).startswith(f"task.vae: {path} holds no diffusers autoencoder: ")
    assert "\n" not in str(caught.value)


def changed(folder: Path, to: Path, config: dict[str, Any], drop: str = "", cut: str = "") -> Path:
    """A copy of an autoencoder with other settings, without a tensor, or with half of one."""
    AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).save_pretrained(to)
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    path = to / "diffusion_pytorch_model.safetensors"
    state = {name: value for name, value in load_file(path).items() if name != drop}
    save_file({name: value[::2].contiguous() if name == cut else value for name, value in state.items()}, path)
    return to


@pytest.mark.parametrize(
    ("config", "drop", "cut", "expected"),
    [
        ({}, "decoder.conv_in.bias", "", " lacks weights, e.g. decoder.conv_in.bias"),
        ({"shift_factor": 0.1}, "", "", " shifts its latents, which no DiT was trained with"),
        ({"shift_factor": 0.0}, "", "", " shifts its latents, which no DiT was trained with"),
        ({}, "", "decoder.conv_in.weight", " holds no diffusers autoencoder: "),
    ],
)
def test_autoencoder_that_is_not_whole_or_of_another_kind(
    config: dict[str, Any], drop: str, cut: str, expected: str, folder: Path, tmp_path: Path
) -> None:
    path = changed(folder, tmp_path / "vae", config, drop, cut)
    with pytest.raises(CheckpointError) as caught:
        VAELatents(path, CPU)
    assert str(caught.value).startswith(f"task.vae: {path}{expected}")
    assert "\n" not in str(caught.value)


def test_autoencoder_that_is_whole_is_taken(folder: Path, tmp_path: Path) -> None:
    images, noise = colours(1), torch.zeros(1, 4, 4, 4)
    found = VAELatents(changed(folder, tmp_path / "vae", {"scaling_factor": 2 * SCALE}), CPU).encode(images, noise)
    torch.testing.assert_close(found, 2 * VAELatents(folder, CPU).encode(images, noise))


# Samples in the place of data


def test_bank_is_a_training_split() -> None:
    data: Any = SimpleNamespace(manifest=object(), mean=torch.zeros(1), std=torch.ones(1))
    samples, labels = torch.randn(5, 1, 2, 2), torch.arange(5) % 2
    bank = GeneratedDataset(samples, labels, data)
    assert (bank.manifest, bank.mean, bank.std) == (data.manifest, data.mean, data.std)
    assert torch.equal(bank.labels("train"), labels)
    indices = np.array([4, 0, 3])
    assert torch.equal(bank.images("train", indices, None), samples[[4, 0, 3]])
    assert torch.equal(bank.images("train", indices, np.random.default_rng(0), slice(1, 3)), samples[[0, 3]])
    with pytest.raises(NotImplementedError):
        bank.resized(4)


# Pictures


@pytest.mark.parametrize("gap", [1, 2])
def test_colour_picture_goes_row_by_row(gap: int) -> None:
    high, wide = 32 * gap, 16
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, high, wide).clone()
    images[:, 1] = -1  # no green
    images[3, :, 0, 2] = 1  # one white pixel
    found = picture(images, 2)
    assert found.dtype == np.uint8
    wanted = np.full((3 * high + 2 * gap, 2 * wide + gap, 3), 128)  # the gaps, and the empty place
    for number, level in enumerate((0, 64, 128, 191, 255)):  # 127.5 rounds to the even one
        row, column = divmod(number, 2)
        tile = wanted[row * (high + gap) :, column * (wide + gap) :][:high, :wide]
        tile[:] = (level, 0, level)
        if number == 3:
            tile[0, 2] = 255
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (3, 4, 1), (5, 4, 2)])
def test_grey_picture_has_no_channels(count: int, columns: int, rows: int) -> None:
    found = picture(torch.ones(count, 1, 2, 3), columns)
    assert found.shape == (rows * 3 - 1, columns * 4 - 1)
    assert (found == 255).sum() == count * 6
    assert (found == 128).sum() == found.size - count * 6


def test_levels_beyond_the_range_are_its_ends() -> None:
    found = picture(torch.tensor([-7.0, 7.0]).view(2, 1, 1, 1), 2)
    assert found.tolist() == [[0, 128, 255]]
