"""Kinds of blocks with channels inside: MLPs, attention and stacks of experts.

They are told by the names of what they hold: those of timm, torchvision, diffusers and transformers, and torch's own.
Whether a block's channels may really move is for :mod:`maskllm4v.sparsity.trial` to find out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from maskllm4v.sparsity.channels import Channels, Outputs, Place, place
from maskllm4v.sparsity.layout import to_rows
from maskllm4v.sparsity.parameters import layout_of

TOKENS = 4  # that blocks are tried with, a sample


class Kind(Protocol):
    """A kind of block."""

    @property
    def reader(self) -> str:
        """The matrix that reads the channels, by its name in the block."""

    def channels(self, block: nn.Module) -> Channels | None:
        """The channels of a block; None if it is not of that kind."""

    def inputs(self, block: nn.Module, noise: torch.Generator) -> list[Tensor]:
        """Something to call a copy of a block of that kind with, in float64; may set the copy up for it."""


@dataclass(frozen=True)
class Layers:
    """Layers inside a block, by name.

    Attributes:
        makers: make the channels, of which they may have several times as many outputs.
        reader: reads them.
        heads: attribute that holds their number, where the makers' last outputs are the values of attention.
        along: modules and parameters with a value per channel, if the block has them.
    """

    makers: tuple[str, ...]
    reader: str
    heads: str | None = None
    along: tuple[str, ...] = ("norm",)

    def channels(self, block: nn.Module) -> Channels | None:
        makers, reader = [inside(block, name) for name in self.makers], inside(block, self.reader)
        if not all(map(_is_linear, [*makers, reader])):
            return None
        count, parts = _rows(reader).shape[1], inside(block, self.heads) if self.heads else 1
        if not _divides(parts, count) or any(_rows(maker).shape[0] % count for maker in makers):
            return None
        outputs: Outputs = "last" if self.heads else "each"
        places = [_read(reader)]
        for maker in makers:
            for tensor in maker.parameters():
                dim = tensor.dim() - 1 if layout_of(maker, "weight") == "columns" else 0
                places.append(place(tensor, dim, count, outputs))
        for name in self.along:
            for tensor in _tensors(inside(block, name)):
                if tensor.ndim and tensor.shape[0] == count:
                    places.append(place(tensor, 0, count))
        return Channels(count, parts, tuple(places))

    def inputs(self, block: nn.Module, noise: torch.Generator) -> list[Tensor]:
        tokens, positions = [TOKENS], getattr(block, "relative_position_index", None)
        if isinstance(positions, Tensor):  # attention in windows: timm's takes one's tokens, torchvision's whole images
            tokens = [len(positions)] if positions.dim() > 1 else list(inside(block, "window_size"))
        width = _rows(inside(block, self.makers[0])).shape[1]
        required = sum(one.default is one.empty for one in _arguments(block))
        return [_random(noise, 2, *tokens, width) for _ in range(max(required, 1))]


@dataclass(frozen=True)
class Attention:
    """torch's own attention, whose matrices are parameters: the values behind queries and keys in one, or apart."""

    reader: str = "out_proj"

    def channels(self, block: nn.Module) -> Channels | None:
        if not isinstance(block, nn.MultiheadAttention):
            return None
        reader, count, heads = block.out_proj, block.embed_dim, block.num_heads
        if not _is_linear(reader) or not _divides(heads, count):
            return None
        places = [_read(reader)]
        for name in ("in_proj_weight", "v_proj_weight", "in_proj_bias"):
            if (tensor := block._parameters.get(name)) is not None:
                places.append(place(tensor, 0, count, "last"))
        if (added := block._parameters.get("bias_v")) is not None:
            places.append(place(added, 2, count))
        return Channels(count, heads, tuple(places))

    def inputs(self, block: nn.Module, noise: torch.Generator) -> list[Tensor]:
        assert isinstance(block, nn.MultiheadAttention)
        widths = (block.embed_dim, block.kdim or block.embed_dim, block.vdim or block.embed_dim)
        return [_random(noise, 2, TOKENS, width) for width in widths]


@dataclass(frozen=True)
class Experts:
    """transformers' experts: stacks ``[experts, ...]`` of matrices, and of biases. Each has an order of its own."""

    makers: tuple[str, ...]
    reader: str = "down_proj"

    def channels(self, block: nn.Module) -> Channels | None:
        stacks = [(name, block._parameters.get(name)) for name in (*self.makers, self.reader)]
        layouts = {layout_of(block, name) for name, tensor in stacks if tensor is not None and tensor.dim() == 3}
        if any(tensor is None for _, tensor in stacks) or len(layouts) != 1 or None in layouts:
            return None
        experts, _, count = _rows(block, self.reader).shape
        places = [_read(block, self.reader)]
        for name in self.makers:
            # Elsewhere than in transformers nobody says that they are not concatenated.
            outputs: Outputs = "each" if getattr(block, "is_concatenated", True) else "pairs"
            for key, dim in ((name, 1 if layouts == {"rows"} else 2), (f"{name}_bias", 1)):
                if (tensor := block._parameters.get(key)) is not None:
                    if tensor.shape[0] != experts or tensor.shape[dim] % count:
                        return None
                    places.append(place(tensor, dim, count, outputs))
        return Channels(count, 1, tuple(places), experts)

    def inputs(self, block: nn.Module, noise: torch.Generator) -> list[Tensor]:
        """As many tokens for each expert, sorted by expert; each one's two experts and their weights, if they ask."""
        experts, width, _ = _rows(block, self.reader).shape
        config: Any = getattr(block, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # faster ones know no float64
        tokens = _random(noise, TOKENS * experts, width)
        if len(_arguments(block)) < 3:
            return [tokens]
        first = torch.arange(experts).repeat_interleave(TOKENS)
        chosen = torch.stack([first, (first + 1) % experts], 1)[:, : min(experts, 2)]
        return [tokens, chosen, torch.rand(chosen.shape, generator=noise, dtype=torch.float64)]


_WITH_VALUES = ("norm", "gate", "v_bias")
KINDS: tuple[Kind, ...] = (
    Layers(("fc1",), "fc2"),  # timm: Mlp, GluMlp; transformers: CLIP, SigLIP, ViT
    Layers(("fc1_g", "fc1_x"), "fc2"),  # timm: SwiGLU
    Layers(("net.0.proj",), "net.2"),  # diffusers: FeedForward
    Layers(("0",), "3"),  # torchvision: MLP
    Layers(("linear1",), "linear2"),  # torch: TransformerEncoderLayer, TransformerDecoderLayer
    Layers(("c_fc",), "c_proj"),  # transformers: GPT-2
    Layers(("gate_proj", "up_proj"), "down_proj"),  # transformers: Llama and its kin, DINOv2
    Layers(("up_proj",), "down_proj"),  # transformers: DINOv3
    Layers(("qkv",), "proj", "num_heads", _WITH_VALUES),  # timm
    Layers(("v_proj",), "proj", "num_heads", _WITH_VALUES),  # timm, where q, k and v are separate
    Layers(("v_proj",), "out_proj", "num_heads"),  # transformers: CLIP, SigLIP
    Layers(("v_proj",), "o_proj", "num_attention_heads"),  # transformers: ViT, DINOv2
    Layers(("c_attn",), "c_proj", "num_heads"),  # transformers: GPT-2
    Layers(("to_v",), "to_out.0", "heads"),  # diffusers
    Attention(),
    Experts(("gate_up_proj",)),
    Experts(("gate_proj", "up_proj")),
    Experts(("up_proj",)),
)


def inside(block: nn.Module, name: str) -> Any:
    """What a block keeps under a dotted name; None if it has nothing there."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _is_linear(layer: Any) -> bool:
    """Whether it is a linear layer, or a transposed one, that nobody has changed."""
    known = type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear)
    return isinstance(layer, nn.Module) and "weight" in layer._parameters and (known or _is_transposed(layer))


def _is_transposed(layer: nn.Module) -> bool:
    return layout_of(layer, "weight") == "columns"


def _rows(module: nn.Module, attribute: str = "weight") -> Tensor:
    """``[..., out, in]``, a view of a matrix."""
    layout, matrix = layout_of(module, attribute), module._parameters[attribute]
    assert layout is not None
    assert matrix is not None
    return to_rows(matrix.detach(), layout)


def _read(module: nn.Module, attribute: str = "weight") -> Place:
    """The inputs of a matrix."""
    matrix = module._parameters[attribute]
    assert matrix is not None
    return Place(matrix, _rows(module, attribute))


def _divides(parts: Any, count: int) -> bool:
    return isinstance(parts, int) and parts >= 1 and count % parts == 0


def _tensors(of: Any) -> Iterator[Tensor]:
    if isinstance(of, nn.Module):
        yield from (*of.parameters(), *of.buffers())
    elif isinstance(of, Tensor):
        yield of


def _random(noise: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=noise, dtype=torch.float64)


def _arguments(block: nn.Module) -> list[inspect.Parameter]:
    """What it can be called with by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [one for one in inspect.signature(block.forward).parameters.values() if one.kind in kinds]
