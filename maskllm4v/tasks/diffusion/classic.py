"""Checkpoints of DiT in their classic names, e.g. ``DiT-XL-2-256x256.pt``, for diffusers' ``DiTTransformer2DModel``.

Written from the paper (Peebles & Xie 2022, arXiv 2212.09748) and from the names and shapes of the published tensors.
Both sides order alike what is stacked: rows of ``qkv`` are queries, keys, values; the six chunks of a block's
modulation are shift, scale, gate of the attention, then of the MLP; the two of the final layer shift, scale; a patch's
outputs row, column, channel. So all weights are renamed, split or joined, and none is changed. What differs:

* DiT has one embedder of timesteps and one of labels; diffusers has a copy of both in every block.
* DiT stores its table of positions; diffusers computes the same one, which is no part of its state dict.
* DiT's 128 frequencies of a timestep are ``10000**(-k / 128)``; diffusers makes them ``10000**(-k / 127)`` unless
  :func:`set_freq_shift` is called, which no configuration and no state dict remembers.
* All of DiT's layer norms have an ε of 1e-6; diffusers' default for one of them is 1e-5: :func:`classic_config`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.masks import load_plain_state
from maskllm4v.checkpoints.third_party import read_torch
from maskllm4v.utils.errors import CheckpointError

# Classic layer: diffusers' layers.
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {  # in every block's norm1.emb
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
POSITIONS, PATCHES, LABELS, OUTPUTS = (
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
)
KINDS = ("weight", "bias")
WAVES = 256  # cosines and sines of a timestep
EPSILON = 1e-6
CLASSIC, OWN = "the classic state dict", "the state dict"  # in messages, unless a caller says a file


def is_classic(state: Mapping[str, Any]) -> bool:
    """Whether the names are the classic ones; complete or not, and never those of ``DiTTransformer2DModel``."""
    return any(name.startswith(("x_embedder.", "t_embedder.", "y_embedder.", "final_layer.")) for name in state)


def read_classic(path: Path) -> dict[str, Tensor]:
    """The classic state dict in a ``.safetensors`` or in any file of ``torch.save``; no code in it is run.

    It is taken from under ``ema``, else ``model``, if it lies there. Tensors of ``torch.save`` stay mapped to the file.

    Raises:
        CheckpointError: missing, damaged, with code in it, or without a tensor named as a DiT's.
    """
    state = load_plain_state(path) if path.suffix == ".safetensors" else read_torch(path)[0]
    if not is_classic(state):
        raise CheckpointError(f"{path} holds no DiT in its classic names (x_embedder.proj.weight, ...)")
    return state


def from_classic(state: Mapping[str, Tensor], origin: str = CLASSIC) -> dict[str, Tensor]:
    """What ``DiTTransformer2DModel.load_state_dict`` takes, strictly.

    Tensors share the storage of ``state``, and the embedders' copies that of each other: 28 tables of labels take the
    memory of one until they are loaded. Call :func:`set_freq_shift` with 0 on the model.

    Args:
        state: classic; pruned weights pass as they are.
        origin: for messages, e.g. the file.

    Raises:
        CheckpointError: a tensor is unknown, missing or misshapen, or the positions are not the sine-cosine table, up
            to the rounding of their type, or of float32 if that is coarser: diffusers would compute others.
    """
    names = _names(_blocks(state, "blocks"))
    sizes = _checked(state, names, origin)
    _check_positions(state[POSITIONS], sizes, origin)
    found: dict[str, Tensor] = {}
    for name, own in names.items():
        parts = state[name].chunk(3) if _is_stacked(name) else (state[name],) * len(own)
        found |= zip(own, parts, strict=True)
    return found


def to_classic(state: Mapping[str, Tensor], sample_size: int, origin: str = OWN) -> dict[str, Tensor]:
    """The inverse of :func:`from_classic`; tensors share storage where nothing is joined.

    Args:
        state: of a ``DiTTransformer2DModel``; pruned weights pass as they are.
        sample_size: height and width of the latents, ``model.config.sample_size``: the table of positions depends on
            it, and the state dict does not tell. It is written in the type of the weights.
        origin: for messages, e.g. the file.

    Raises:
        CheckpointError: a tensor is unknown, missing or misshapen; no patch fits; or the blocks' embedders differ, as
            they do in a model that diffusers trained from scratch, and which the classic format cannot hold.
    """
    names = _names(_blocks(state, "transformer_blocks"))
    sizes = _checked(state, names, origin, own=True)
    side = sample_size // sizes.patch
    if side < 1:
        raise CheckpointError(f"{origin}: latents of {sample_size} × {sample_size} hold no patch of {sizes.patch}")
    found: dict[str, Tensor] = {}
    for name, own in names.items():
        tensors = [state[each] for each in own]
        for other, tensor in zip(own, tensors, strict=True):
            if not _is_stacked(name) and not tensor.equal(tensors[0]):
                raise CheckpointError(f"{origin}: {other} differs from {own[0]}, but a classic DiT has one {name}")
        found[name] = torch.cat(tensors) if _is_stacked(name) else tensors[0]
    return {POSITIONS: _positions(side, sizes.width).to(found[PATCHES]), **found}


def classic_config(state: Mapping[str, Tensor], heads: int, origin: str = CLASSIC) -> dict[str, Any]:
    """Arguments of ``DiTTransformer2DModel`` for a classic state dict.

    Args:
        state: classic.
        heads: of the attention, which the tensors do not tell: 6, 12, 16 and 16 in the paper's S, B, L and XL.
        origin: for messages, e.g. the file.

    Raises:
        CheckpointError: as :func:`from_classic`, but for the positions' values; or the heads do not divide the width.
    """
    blocks = _blocks(state, "blocks")
    sizes = _checked(state, _names(blocks), origin)
    if heads < 1 or sizes.width % heads:
        raise CheckpointError(f"{origin}: {heads} heads do not divide the width {sizes.width}")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": sizes.width // heads,
        "in_channels": sizes.channels,
        "out_channels": sizes.outputs // sizes.patch**2,
        "num_layers": blocks,
        "sample_size": _grid(state[POSITIONS], sizes, origin) * sizes.patch,
        "patch_size": sizes.patch,
        "num_embeds_ada_norm": sizes.labels - 1,  # the last one stands for no label
        "norm_eps": EPSILON,
    }


def set_freq_shift(model: nn.Module, shift: int) -> None:
    """Let every block embed a timestep with the frequencies ``10000**(-k / (128 - shift))``, k = 0 … 127.

    Args:
        model: a ``DiTTransformer2DModel``, changed in place; neither its configuration nor its state dict tells.
        shift: 0 for weights that were trained in the classic code, wherever they are now; 1 is diffusers' own.
    """
    blocks: Any = model.transformer_blocks
    for block in blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


@dataclass(frozen=True)
class _Sizes:
    """``labels``: rows of the table, that of no label among them; ``outputs``: numbers a patch."""

    width: int
    channels: int
    patch: int
    labels: int
    outputs: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a classic tensor other than the positions."""
        d = self.width
        layer, _, kind = name.rpartition(".")
        weights: dict[str, tuple[int, ...]] = {
            "x_embedder.proj": (d, self.channels, self.patch, self.patch),
            "t_embedder.mlp.0": (d, WAVES),
            "t_embedder.mlp.2": (d, d),
            "y_embedder.embedding_table": (self.labels, d),
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d),
            "adaLN_modulation.1": (6 * d, d),
            "final_layer.adaLN_modulation.1": (2 * d, d),
            "final_layer.linear": (self.outputs, d),
        }
        shape = weights[layer.split(".", 2)[2] if layer.startswith("blocks.") else layer]
        return shape if kind == "weight" else shape[:1]


def _is_stacked(name: str) -> bool:
    """Whether a classic tensor holds three of diffusers' on top of each other (otherwise they are copies of it)."""
    return ".attn.qkv." in name


def _names(blocks: int) -> dict[str, tuple[str, ...]]:
    """Diffusers' tensors by classic tensor, for all but the positions."""
    layers: dict[str, tuple[str, ...]] = {layer: (own,) for layer, own in ENDS.items()}
    for layer, inner in EMBEDDERS.items():
        layers[layer] = tuple(f"transformer_blocks.{i}.norm1.emb.{inner}" for i in range(blocks))
    for i in range(blocks):
        for layer, several in BLOCK.items():
            layers[f"blocks.{i}.{layer}"] = tuple(f"transformer_blocks.{i}.{own}" for own in several)
    both = {f"{layer}.{kind}": tuple(f"{o}.{kind}" for o in own) for layer, own in layers.items() for kind in KINDS}
    del both["y_embedder.embedding_table.bias"]
    return both


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks have a tensor; one if none has, so that its tensors are named as missing."""
    return max(1, len({found[1] for name in state if (found := re.match(rf"{prefix}\.(\d+)\.", name))}))


def _checked(
    state: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], origin: str, own: bool = False
) -> _Sizes:
    """The sizes of a model after all names and shapes, but the positions', have been checked.

    Args:
        state: classic, or of diffusers if ``own``.
        names: of :func:`_names`.
        origin: for messages.
        own: see ``state``.
    """
    here = names if own else {name: (name,) for name in names}  # this state's tensors by classic tensor
    expected = {each for several in here.values() for each in several} | (set() if own else {POSITIONS})
    faults = [
        f"{what} {_some(found)}"
        for what, found in (("lacks", expected - state.keys()), ("has unknown", state.keys() - expected))
        if found
    ]
    if faults:
        raise CheckpointError(f"{origin} is not a DiT's: it {' and '.join(faults)}")

    patches, labels, outputs = (state[here[name][0]] for name in (PATCHES, LABELS, OUTPUTS))
    if patches.dim() != 4:
        raise CheckpointError(f"{origin}: {here[PATCHES][0]} is {_size(patches)}, not width×channels×patch×patch")
    width = Counter(tensor.shape[-1] if tensor.dim() else 1 for tensor in state.values()).most_common(1)[0][0]
    channels, patch = patches.shape[1:3]
    rows = outputs.shape[0] if outputs.dim() else 1
    outs = min((channels * patch**2, 2 * channels * patch**2), key=lambda count: abs(count - rows))  # 2: learned σ
    sizes = _Sizes(width, channels, patch, max(2, labels.shape[0] if labels.dim() else 0), outs)
    wrong = []
    for name, several in here.items():
        shape = sizes.shape(name)
        if own and _is_stacked(name):
            shape = (shape[0] // 3, *shape[1:])
        wrong += [f"{e} is {_size(state[e])}, not {_size(shape)}" for e in several if tuple(state[e].shape) != shape]
    if wrong:
        raise CheckpointError(
            f"{origin}: {_some(wrong)}, with patches of {channels} × {patch} × {patch} in {here[PATCHES][0]}"
        )
    return sizes


def _check_positions(found: Tensor, sizes: _Sizes, origin: str) -> None:
    table = _positions(_grid(found, sizes, origin), sizes.width)
    if not found.is_floating_point():
        raise CheckpointError(f"{origin}: {POSITIONS} is of type {found.dtype}")
    error = float((found.detach().cpu().double() - table.double()).abs().max())
    if not error <= max(torch.finfo(found.dtype).eps, 4 * torch.finfo(torch.float32).eps):  # NaN is no number ≤
        raise CheckpointError(
            f"{origin}: {POSITIONS} is off the sine-cosine table, which diffusers has, by {error:.2g}"
        )


def _grid(positions: Tensor, sizes: _Sizes, origin: str) -> int:
    """The patches on a side of the image, of ``[1, side², width]``."""
    side = math.isqrt(positions.shape[1]) if positions.dim() > 1 else 0
    if tuple(positions.shape) != (1, side**2, sizes.width) or not side or sizes.width % 4:
        wanted = f"1×n²×{sizes.width}" + (", the width a multiple of 4" if sizes.width % 4 else "")
        raise CheckpointError(f"{origin}: {POSITIONS} is {_size(positions)}, not {wanted}")
    return side


def _positions(side: int, width: int) -> Tensor:
    """As diffusers' ``PatchEmbed`` computes them: float32 ``[1, side², width]``."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed  # an extra of the package, and slow to import

    return get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float().unsqueeze(0)


def _some(found: Iterable[str], limit: int = 3) -> str:
    several = sorted(found)
    return ", ".join(several[:limit]) + (f" and {len(several) - limit} more" if len(several) > limit else "")


def _size(shape: Tensor | Iterable[int]) -> str:
    return "×".join(map(str, shape.shape if isinstance(shape, Tensor) else shape)) or "one number"
