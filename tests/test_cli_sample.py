"""The command sample: rows, a diffusers folder with masks, a classic checkpoint; the same noise for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import run, well
from torch import nn

pytest.importorskip("diffusers")

from diffusers import DDPMScheduler, DiTTransformer2DModel
from small_diffusion import dit, make_autoencoder, raw

from maskllm4v.checkpoints.format import tensors_digest
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_dense, save_dense, save_masks
from maskllm4v.config import Experiment, load_experiment
from maskllm4v.runs.paths import checkpoint, data_folder
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.tasks.diffusion.classic import to_classic
from maskllm4v.tasks.diffusion.task import Diffusion
from maskllm4v.utils.images import read_picture

FAST = ("--steps", "4", "--sampler", "ddim", "--device", "cpu")
PATTERN = NMPattern("2:4")


def params(**sections: Any) -> dict[str, Any]:
    rows = {"dense": "Dense", "magnitude": "Magnitude", "wanda": "Wanda"}
    priors = {row: {"method": row} for row in ("magnitude", "wanda")}
    return raw(dense={"shared": True}, priors=priors, rows=rows, **sections)


def half(model: nn.Module, *, last: bool) -> dict[str, torch.Tensor]:
    """Masks that keep two fixed places of four."""
    layers = prunable_linears(model, exclude=["transformer_blocks.*.norm1.*", "proj_out_*"])
    kept = torch.tensor([last, last, not last, not last])
    return {name: kept.repeat(layer.weight.numel() // 4).view(layer.weight.shape) for name, layer in layers.items()}


def masked(path: Path, model: nn.Module, *, last: bool) -> None:
    base = tensors_digest(model.state_dict())
    save_masks(path, MaskCheckpoint(PATTERN, half(model, last=last), base, "magnitude", {}, prior={}))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a dense model and the masks of one of two rows, of both seeds."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(params()))
    save_dense(checkpoint("dense", 0), dit(), "DiTTransformer2DModel")
    for seed in (0, 1):
        masked(checkpoint("magnitude", seed), dit(), last=bool(seed))
    return tmp_path


def picture(name: str, folder: str = "samples") -> np.ndarray:
    return read_picture(Path(folder) / f"{name}.png")


def made(folder: str = "samples") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# Rows


def test_rows_that_are_made(here: Path) -> None:
    done = well("sample", "--device", "cpu")
    assert done.out == ""
    assert done.err.splitlines() == ["samples/dense.png", "samples/magnitude.png"]
    assert made() == ["dense.png", "magnitude.png"]
    assert picture("dense").shape == (17, 17, 3)
    assert not np.array_equal(picture("dense"), picture("magnitude"))


def test_pictures_are_those_of_the_evaluation(here: Path) -> None:
    experiment: Experiment = load_experiment()
    task, model = Diffusion(experiment.task_spec(), data_folder("digits")), dit()
    load_dense(checkpoint("dense", 0), model, "DiTTransformer2DModel")
    well("sample", "dense", "--device", "cpu")
    assert np.array_equal(picture("dense")[:, :, 0], task.pictures(model)["samples"])


def test_flags_go_before_the_experiments_settings(here: Path) -> None:
    well("sample", "dense", *FAST, "--classes", "9", "9", "0", "1", "--columns", "4", "-o", "a")
    assert picture("dense", "a").shape == (8, 35, 3)
    well("sample", "dense", *FAST, "--classes", "9", "9", "0", "1", "--columns", "4", "--guidance", "1", "-o", "b")
    well("sample", "dense", *FAST, "--classes", "9", "9", "0", "1", "--columns", "4", "--seed", "1", "-o", "c")
    well("sample", "dense", *FAST, "--classes", "9", "9", "0", "1", "--columns", "4", "-o", "d")
    assert np.array_equal(picture("dense", "a"), picture("dense", "d"))
    assert not np.array_equal(picture("dense", "a"), picture("dense", "b"))
    assert not np.array_equal(picture("dense", "a"), picture("dense", "c"))


def test_all_models_start_from_the_same_noise(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = DiTTransformer2DModel.forward

    def watched(self: nn.Module, inputs: torch.Tensor, **others: Any) -> Any:
        seen.append((inputs, others["timestep"][0].item()))
        return forward(self, inputs, **others)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", watched)
    well("sample", *FAST)
    starts = [inputs for inputs, timestep in seen if timestep == 999]
    assert len(seen) == 2 * 4
    assert len(starts) == 2
    assert torch.equal(starts[0], starts[1])


def test_precision_of_evaluation_is_that_of_samples(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = DiTTransformer2DModel.forward

    def watched(self: nn.Module, *inputs: torch.Tensor, **others: Any) -> Any:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return forward(self, *inputs, **others)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", watched)
    for amp, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        Path("params.yaml").write_text(yaml.safe_dump(params(task={"eval_amp": amp})))
        well("sample", "dense", *FAST, "-o", amp)
        assert seen == [dtype] * 4
        seen.clear()
    assert not np.array_equal(picture("dense", "no"), picture("dense", "bf16"))


def test_seed_of_a_row(here: Path) -> None:
    """The dense model is all seeds'; the masks are not."""
    for seed in ("0", "1"):
        well("sample", *FAST, "--seed-of-row", seed, "-o", seed)
        assert made(seed) == ["dense.png", "magnitude.png"]
    assert np.array_equal(picture("dense", "0"), picture("dense", "1"))
    assert not np.array_equal(picture("magnitude", "0"), picture("magnitude", "1"))


# Checkpoints


def folder_of_diffusers(model: Any, path: Path, **schedule: Any) -> Path:
    model.save_pretrained(path / "transformer")
    DDPMScheduler(**schedule).save_pretrained(path / "scheduler")
    return path


def test_diffusers_folder_with_masks(here: Path) -> None:
    model = dit()
    folder_of_diffusers(model, here / "DiT")
    masked(here / "first.safetensors", model, last=False)
    masked(here / "last.safetensors", model, last=True)
    masks = ("--masks", "first.safetensors", "last.safetensors")
    well("sample", *FAST, "--checkpoint", "DiT", *masks, "--classes", "1", "2", "3", "--columns", "2", "--clip")
    assert made() == ["DiT.png", "first.png", "last.png"]
    assert len({picture(name).tobytes() for name in ("DiT", "first", "last")}) == 3
    # as the rows of a project with the same models
    well("sample", *FAST, "magnitude", "dense", "--guided-channels", "1", "--guidance", "4", "--clip", "-o", "rows")
    assert np.array_equal(picture("dense", "rows"), picture("DiT"))
    assert np.array_equal(picture("magnitude", "rows"), picture("first"))


def test_schedule_of_the_folder_counts(here: Path) -> None:
    for name, beta in (("one", 0.02), ("two", 0.01)):
        folder_of_diffusers(dit(), here / name, beta_end=beta)
        well("sample", *FAST, "--checkpoint", name, "--classes", "1")
    assert not np.array_equal(picture("one"), picture("two"))


def test_older_folder(here: Path) -> None:
    """Arguments that only other kinds of transformers have, all off."""
    folder_of_diffusers(dit(), here / "new")
    folder_of_diffusers(dit(), here / "old")
    path = here / "old" / "transformer" / "config.json"
    others = {"cross_attention_dim": None, "only_cross_attention": False, "_class_name": "Transformer2DModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **others}))
    for name in ("old", "new"):
        well("sample", *FAST, "--checkpoint", name, "--classes", "1")
    assert np.array_equal(picture("old"), picture("new"))


@pytest.fixture
def classic() -> dict[str, torch.Tensor]:
    """As wide as DiT-S, with one block, on pixels."""
    model = dit(num_attention_heads=6, attention_head_dim=64, num_layers=1, out_channels=2)
    return dict(to_classic(model.state_dict(), 8))


def test_classic_checkpoint(here: Path, classic: dict[str, torch.Tensor]) -> None:
    model = dit(num_attention_heads=6, attention_head_dim=64, num_layers=1, out_channels=2, norm_eps=1e-6)
    torch.save(classic, "DiT-S-4.pt")
    folder_of_diffusers(model, here / "folder")
    for path in ("DiT-S-4.pt", "folder"):
        well("sample", "--steps", "4", "--device", "cpu", "--ckpt", path, "--classes", "3", "7", "--clip")
    assert picture("DiT-S-4").shape == (8, 35, 3)
    difference = picture("DiT-S-4").astype(int) - picture("folder").astype(int)
    assert abs(difference).max() <= 1


def test_latents_are_decoded(here: Path) -> None:
    latent = dit(in_channels=4, out_channels=8, sample_size=4, patch_size=2)
    folder_of_diffusers(latent, here / "latent")
    done = run("sample", *FAST, "--checkpoint", "latent", "--classes", "1")
    assert done.code == 1
    assert done.err == "sample: latent makes latents; say --vae FOLDER, a diffusers AutoencoderKL\n"
    make_autoencoder(here / "vae", 0.5)
    well("sample", *FAST, "--checkpoint", "latent", "--classes", "1", "--vae", "vae", "-o", "beside")
    make_autoencoder(here / "latent" / "vae", 0.5)
    well("sample", *FAST, "--checkpoint", "latent", "--classes", "1", "-o", "inside")
    assert picture("latent", "beside").shape == (16, 67, 3)
    assert np.array_equal(picture("latent", "beside"), picture("latent", "inside"))
    for channels, same in (("3", True), ("4", False)):  # DiT's authors guide three of four
        well("sample", *FAST, "--ckpt", "latent", "--classes", "1", "--guided-channels", channels, "-o", channels)
        assert np.array_equal(picture("latent", "inside"), picture("latent", channels)) is same


# Bad input


BAD = {
    "class": (("dense", "--classes", "3", "10"), "no class 10; the model has 10"),
    "negative class": (("dense", "--classes", "-1"), "evaluation.grid.0 is -1"),
    "columns": (("dense", "--columns", "0"), "evaluation.columns is 0"),
    "guidance": (("dense", "--guidance", "0.5"), "evaluation.guidance is 0.5"),
    "steps": (("dense", "--steps", "1001"), "1001 steps, but the noise schedule has 1000"),
    "row": (("nothing",), "no row 'nothing' in this experiment; allowed: dense, magnitude, wanda"),
    "row that is not made": (("wanda",), "artifacts/wanda/seed0.safetensors is missing"),
    "seed": (("dense", "--seed-of-row", "7"), "no seed 7; allowed: 0, 1"),
    "both": (("dense", "--checkpoint", "a.pt"), "either rows or --checkpoint; found 'dense' and a.pt"),
    "masks of rows": (("dense", "--masks", "m.safetensors"), "--masks goes with --checkpoint"),
    "autoencoder of rows": (("dense", "--vae", "vae"), "--vae goes with --checkpoint"),
    "no file": (("--checkpoint", "a.pt"), "a.pt is missing"),
    "no folder": (
        ("--checkpoint", "artifacts"),
        "artifacts is no diffusers folder: transformer/config.json is missing",
    ),
    "no params": (("--params", "nowhere.yaml"), "cannot read nowhere.yaml"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind: str, here: Path) -> None:
    flags, message = BAD[kind]
    done = run("sample", *flags, "--device", "cpu")
    assert done.code == 1
    assert done.err.startswith("sample: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not Path("samples").exists()


def test_nothing_is_made_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(params()))
    assert run("sample").err == "sample: no row of params.yaml is made yet; run `dvc repro`\n"


def test_classification_makes_no_images(here: Path) -> None:
    from small_params import params as classification

    Path("params.yaml").write_text(yaml.safe_dump(classification()))
    done = run("sample", "dense")
    assert done.err == "sample: params.yaml is an experiment of task 'classification', which makes no images\n"


def test_masks_of_another_model_or_of_the_same_name(here: Path) -> None:
    folder_of_diffusers(dit(), here / "DiT")
    masked(here / "other.safetensors", dit(1), last=True)
    (here / "a").mkdir()
    for name in ("a/same.safetensors", "same.safetensors"):
        masked(here / name, dit(), last=True)
    done = run("sample", *FAST, "--checkpoint", "DiT", "--classes", "1", "--masks", "other.safetensors")
    assert "other.safetensors belongs to another dense model" in done.err
    masks = ("--masks", "same.safetensors", "a/same.safetensors")
    done = run("sample", *FAST, "--checkpoint", "DiT", "--classes", "1", *masks)
    assert "two files of the same name" in done.err


def test_width_that_no_dit_has(here: Path) -> None:
    torch.save(to_classic(dit(num_layers=1).state_dict(), 8), "narrow.pt")
    done = run("sample", "--checkpoint", "narrow.pt")
    assert done.err == (
        "sample: narrow.pt: no DiT is 16 wide, so its heads are unknown; give a diffusers folder\n"
    )  # fmt: skip
