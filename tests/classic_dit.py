"""A DiT written from its paper, in float64 and in the names of its published checkpoints: an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.utils.errors import CheckpointError

pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel

from maskllm4v.tasks.diffusion.classic import (
    classic_config,
    from_classic,
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    width: int
    heads: int
    blocks: int
    patch: int
    sample: int
    channels: int
    classes: int
    sigma: bool

    def __str__(self) -> str:
        return f"{self.width}w{self.blocks}b{self.patch}p{'-sigma' * self.sigma}"


SMALL = Size(24, 2, 2, 2, 8, 4, 5, True)
SIZES = [
    SMALL,
    Size(24, 3, 2, 2, 8, 4, 5, False),
    Size(48, 4, 3, 1, 6, 3, 1, True),
    Size(64, 2, 1, 4, 16, 1, 10, False),
    Size(256, 4, 1, 2, 4, 4, 3, True),  # as wide as the waves of a timestep
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def positions(side: int, width: int) -> Tensor:
    """The paper's (after ViT, MAE) table: a quarter each of sin x, cos x, sin y, cos y, x the column; float32."""
    quarter = width // 4
    rows = []
    for y in range(side):
        for x in range(side):
            angles = [[place / 10000 ** (k / quarter) for k in range(quarter)] for place in (x, y)]
            rows.append([wave(angle) for some in angles for wave in (math.sin, math.cos) for angle in some])
    return torch.tensor(rows, dtype=torch.float64).float()[None]


def classic(size: Size, seed: int = 0) -> State:
    """Random weights, those of the modulation among them, which adaLN-Zero starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {"pos_embed": positions(size.sample // size.patch, size.width).double()}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[f"{name}.weight"] /= math.sqrt(math.prod(shape[1:])) if bias else 1
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator, dtype=torch.float64)

    d, p = size.width, size.patch
    layer("x_embedder.proj", d, size.channels, p, p)
    layer("t_embedder.mlp.0", d, 256)
    layer("t_embedder.mlp.2", d, d)
    layer("y_embedder.embedding_table", size.classes + 1, d, bias=False)
    for i in range(size.blocks):
        layer(f"blocks.{i}.attn.qkv", 3 * d, d)
        layer(f"blocks.{i}.attn.proj", d, d)
        layer(f"blocks.{i}.mlp.fc1", 4 * d, d)
        layer(f"blocks.{i}.mlp.fc2", d, 4 * d)
        layer(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    layer("final_layer.adaLN_modulation.1", 2 * d, d)
    layer("final_layer.linear", p * p * size.channels * (1 + size.sigma), d)
    return state


def paper(state: State, size: Size, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """DiT with adaLN-Zero, section 3 of the paper. ``[B, C, S, S]`` to ``[B, C or 2 C, S, S]``."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale[:, None]) + shift[:, None]

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.qkv", x).reshape(*x.shape[:2], 3, size.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return linear(f"{name}.proj", (scores @ v).transpose(1, 2).flatten(2))

    p, side, batch = size.patch, size.sample // size.patch, len(latents)
    patches = latents.reshape(batch, -1, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
    x = linear("x_embedder.proj", patches) + state["pos_embed"]

    # Of single precision, as in both implementations: an angle of 999 has no more than 4 digits behind the point in it.
    angles = times[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], 1).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][labels])
    for i in range(size.blocks):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        x = x + gate1[:, None] * attention(f"{block}.attn", modulated(x, shift1, scale1))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", modulated(x, shift2, scale2)), approximate="tanh")
        x = x + gate2[:, None] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    x = linear("final_layer.linear", modulated(x, shift, scale))
    x = x.reshape(batch, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, size.sample, size.sample)


def batch(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps from the first to the last, and labels with that of none among them."""
    times = torch.tensor([0, 1, 7, 250, 500, 731, 999])
    labels = torch.arange(size.classes, size.classes + len(times)) % (size.classes + 1)
    latents = torch.randn(len(times), size.channels, size.sample, size.sample, dtype=torch.float64)
    return latents, times, labels


def loaded(state: State, size: Size, **options: Any) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(**classic_config(state, size.heads) | options).double().eval()
    model.load_state_dict(from_classic(state), strict=True)
    return model


@torch.no_grad()
def outputs(model: DiTTransformer2DModel, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    return model(latents, timestep=times, class_labels=labels).sample


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
