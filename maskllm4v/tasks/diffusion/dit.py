"""The diffusion transformer: diffusers' ``DiTTransformer2DModel``, as the DiT paper (arXiv 2212.09748) starts it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import load_plain_state
from maskllm4v.checkpoints.third_party import read_torch
from maskllm4v.tasks.diffusion.classic import from_classic, is_classic, read_classic, set_freq_shift
from maskllm4v.tasks.diffusion.settings import DiTSettings
from maskllm4v.utils.errors import CheckpointError, ConfigError
from maskllm4v.utils.io import read_json
from maskllm4v.utils.rng import torch_seed

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # in a diffusers folder


def build_dit(settings: DiTSettings, seed: int) -> nn.Module:
    """A DiT in evaluation mode.

    Args:
        settings: the architecture, in diffusers' arguments.
        seed: of the initial weights, see :func:`initialise`.

    Raises:
        ConfigError: diffusers is not installed, or these are not its arguments.
    """
    architecture = _architecture()
    from diffusers.models.attention_processor import AttnProcessor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "weights"))
        try:
            model: nn.Module = architecture(**settings.args)
        except (NotImplementedError, TypeError, ValueError, ZeroDivisionError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"model.args do not fit {settings.name!r}: {said}") from error
        if settings.args.get("dropout"):
            raise ConfigError("model.args.dropout would do nothing: models are trained in evaluation mode")
        if settings.args.get("sample_size", 32) % settings.args.get("patch_size", 2):
            raise ConfigError("model.args: patch_size does not divide sample_size")
        initialise(model)
    set_freq_shift(model, settings.freq_shift)
    for block in blocks(model):
        if not settings.fused_attention:
            block.attn1.set_processor(AttnProcessor())
    return model.eval()


def _architecture() -> Any:
    try:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    except ImportError as error:
        raise ConfigError(f"task 'diffusion' needs diffusers: pip install 'maskllm4v[diffusion]' ({error})") from error
    return DiTTransformer2DModel


def blocks(model: nn.Module) -> Any:
    """The transformer blocks (``BasicTransformerBlock``), in order."""
    return model.transformer_blocks


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """adaLN-Zero (Peebles & Xie 2022, Sec. 3.2), which diffusers leaves out.

    Every block starts as the identity, and the output as zero; all else stays as it was drawn.
    """
    for layer in (model.proj_out_1, model.proj_out_2, *(block.norm1.linear for block in blocks(model))):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def condition(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Run nothing but the blocks' modulation layers: all that their calibration needs.

    Their inputs depend on the timesteps ``[B]`` and labels ``[B]`` of the batch alone.
    """
    timesteps, labels = batch
    for block in blocks(model):
        embedded = block.norm1.emb(timesteps, labels, hidden_dtype=block.norm1.linear.weight.dtype)
        block.norm1.linear(block.norm1.silu(embedded))


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A DiT's state dict in diffusers' names.

    Args:
        path: a diffusers folder (or its ``transformer/``), a file of ours or of diffusers (safetensors), or a
            checkpoint in the names of DiT's authors, such as ``DiT-XL-2-256x256.pt``.

    Raises:
        CheckpointError: missing, damaged, or none of these.
    """
    if path.is_dir():
        places = [folder / name for folder in (path / "transformer", path) for name in WEIGHTS]
        found = [file for file in places if file.exists()]
        if not found:
            raise CheckpointError(f"{path} is no diffusers folder: transformer/{WEIGHTS[0]} is missing")
        return load_plain_state(found[0]) if found[0].suffix == ".safetensors" else read_torch(found[0])[0]
    if path.suffix == ".safetensors" and not is_classic(state := load_plain_state(path)):
        return state
    return from_classic(read_classic(path), str(path))


def read_config(folder: Path) -> dict[str, Any]:
    """The arguments of the architecture in a diffusers folder (or its ``transformer/``).

    Older folders are of diffusers' class for several kinds of transformers: arguments of the other kinds are dropped
    if they are off, and otherwise left for :func:`build_dit` to refuse.

    Raises:
        CheckpointError: there are none.
        ConfigError: diffusers is not installed.
    """
    found = [file for file in (folder / "transformer" / "config.json", folder / "config.json") if file.exists()]
    if not found:
        raise CheckpointError(f"{folder} is no diffusers folder: transformer/config.json is missing")
    known = inspect.signature(_architecture()).parameters
    config = {key: value for key, value in read_json(found[0]).items() if not key.startswith("_")}
    return {key: value for key, value in config.items() if key in known or value not in (None, False)}
