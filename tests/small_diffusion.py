"""A diffusion experiment on digits that is as small as can be; models whose outputs are not zero; a noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.runs.paths import judge_file
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.tasks.diffusion.dit import build_dit
from maskllm4v.tasks.diffusion.noising import NoisyBatch
from maskllm4v.tasks.diffusion.settings import DiTSettings
from maskllm4v.tasks.diffusion.task import Diffusion

ARGS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 4,
    "num_embeds_ada_norm": 10,
}
JUDGE = {
    "model": {
        "name": "VisionTransformer",
        "args": {
            **{"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1},
            **{"num_heads": 2, "class_token": False, "global_pool": "avg"},
        },
        "fused_attention": False,
    },
    "training": {"steps": 40, "batch_size": 64, "lr": 0.01},
}
LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def raw(**sections: Any) -> dict[str, Any]:
    """Params; what is given of a section goes on top."""
    found: dict[str, Any] = {
        "table": "t",
        "title": "T",
        "seeds": [0, 1],
        "data": {"name": "digits", "source": "digits", "calibration": 30},
        "task": {
            **{"name": "diffusion", "conditioning_samples": 70, "eval_batch_size": 300},
            "bank": {"samples": 24, "sampler": "ddim", "steps": 2, "guidance": 1.0},
        },
        "model": {"name": "DiTTransformer2DModel", "args": ARGS, "fused_attention": False},
        "dense": {"row": "dense", "init": "scratch", "steps": 3},
        "evaluation": {"steps": 2, "timesteps": 2, "images": 50, "grid": [1, 2, 3], "columns": 2},
        "rows": {"dense": "Dense"},
        "runtime": {"device": "cpu"},
    }
    for name, values in sections.items():
        replaces = not isinstance(values, dict) or name not in found or name == "rows"
        found[name] = values if replaces else {**found[name], **values}
    return found


def experiment(**sections: Any) -> Experiment:
    return parse_experiment(raw(**sections))


def open_small(folder: Path, **sections: Any) -> Diffusion:
    """The task on digits that :func:`maskllm4v.data.prepare` has put into a folder."""
    return Diffusion(experiment(**sections).task_spec(judge=judge_file("dense")), folder)


def with_outputs(channels: int) -> dict[str, Any]:
    """Sections of a model that gives out one channel, or its variance too: such a one cannot be trained here."""
    loaded = {"dense": {"init": "checkpoint", "checkpoint": "dense.safetensors"}} if channels == 2 else {}
    return {"model": {"args": {**ARGS, "out_channels": channels}}, **loaded}


def dit(seed: int = 0, **args: Any) -> nn.Module:
    """A DiT that says something: the first weights of one are zero where it counts."""
    settings = DiTSettings(name="DiTTransformer2DModel", args={**ARGS, **args}, fused_attention=False)
    return awake(build_dit(settings, seed), seed)


@torch.no_grad()
def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def make_autoencoder(folder: Path, scale: float) -> Path:
    """A folder of diffusers' AutoencoderKL, of random weights, that halves colour images twice."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 4, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
            scaling_factor=scale,
        ).save_pretrained(folder)
    return folder


def alphas(schedule: dict[str, Any] = LINEAR) -> np.ndarray:
    """ᾱ_t of a linear schedule, in float64 (Ho et al. 2020)."""
    betas = np.linspace(schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])
    return np.cumprod(1 - betas)


class Oracle(nn.Module):
    """Knows x₀ of every label, and so the noise in any x_t; what it was asked for is in ``asked``."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean, self.alphas = clean, torch.from_numpy(alphas())
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, inputs: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.asked.append((timestep, class_labels))
        alpha = self.alphas[timestep].view(-1, 1, 1, 1)
        return ((inputs.double() - alpha.sqrt() * self.clean[class_labels]).div((1 - alpha).sqrt()).float(),)


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def pixels(task: Diffusion, split: str, indices: np.ndarray) -> Tensor:
    """Images in [-1, 1], in float64."""
    images = task.data.images(split, indices, None).double()
    return (images * task.data.std.double() + task.data.mean.double()) * 2 - 1


def clean(batch: NoisyBatch) -> Tensor:
    """x₀ of a batch, in float64."""
    alpha = torch.from_numpy(alphas())[batch.timesteps].view(-1, 1, 1, 1)
    return (batch.inputs.double() - (1 - alpha).sqrt() * batch.noise.double()) / alpha.sqrt()


def assert_same_images(found: Tensor, wanted: Tensor, batch: NoisyBatch) -> None:
    """Up to what the noise leaves of them, in float32."""
    tolerance = (
        1e-4
        * max(1.0, wanted.abs().max().item())
        / torch.from_numpy(alphas())[batch.timesteps].sqrt().view(-1, 1, 1, 1)
    )
    assert ((found - wanted).abs() <= tolerance).all()


def parts(task: Diffusion, batch_size: int = 20, seed: int = 0) -> tuple[Calibration, Calibration]:
    first, second = task.calibration(batch_size, seed)
    return first, second
