"""Packed N:M weights: kept values, and where in each group they stand; and the files that hold them.

A weight ``[out, in]`` becomes ``values [out, in · N/M]`` in the weight's type, in the order of the row, and
``positions``, uint8 ``[out, ceil(in/M · N · b / 8)]`` with b = ⌈log₂ M⌉: a row's positions, b bits each, lowest bit
first, unused last bits zero. 2:4 takes 4 bits a group, two groups a byte: 0.5625 of the dense size in 16 bits,
0.53125 in 32. Each row ends on a byte, so that rows can be read apart.

A packed file is a sealed safetensors one with ``<layer>.weight.values`` and ``<layer>.weight.positions`` of each masked
layer, and all other tensors of the state dict as they are. A parameter that is not called ``weight`` goes by its own
name; of one that is not ``[out, in]`` the header's ``stored`` says layout and shape, and its rows stand one below the
other. :mod:`maskllm4v.export.files` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.format import load_verified, odd_header
from maskllm4v.checkpoints.masks import load_state
from maskllm4v.sparsity.layout import Layout, from_rows, to_rows
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError, PatternError

VALUES, POSITIONS = ".weight.values", ".weight.positions"
Model = TypeVar("Model", bound=nn.Module)


def position_bits(pattern: NMPattern) -> int:
    """Bits that name a place in a group: 2 for M = 4."""
    return (pattern.m - 1).bit_length()


def pack_weight(weight: Tensor, mask: Tensor, pattern: NMPattern, layer: str = "weight") -> tuple[Tensor, Tensor]:
    """Values and positions of a weight ``[out, in]`` that is zero wherever its mask is.

    Raises:
        PatternError: the mask is of another shape or pattern, or the weight is not zero where the mask is.
    """
    if weight.shape != mask.shape:
        raise PatternError(f"layer {layer!r}: mask {tuple(mask.shape)} for a weight {tuple(weight.shape)}")
    pattern.validate(mask, layer)
    if bool((weight[~mask] != 0).any()):
        raise PatternError(f"layer {layer!r}: the weight is not zero where its mask is; fold the model first")
    rows = len(weight)
    places = torch.arange(pattern.m, dtype=torch.uint8, device=weight.device).expand(weight.numel() // pattern.m, -1)
    kept = places.reshape(rows, -1)[mask].reshape(rows, -1)  # row by row, rising within each group
    return weight[mask].reshape(rows, -1), _to_bits(kept, position_bits(pattern))


def unpack_weight(
    values: Tensor, positions: Tensor, pattern: NMPattern, layer: str = "weight"
) -> tuple[Tensor, Tensor]:
    """The weight ``[out, in]``, zeros put back, and its mask, of what :func:`pack_weight` gave.

    Raises:
        PatternError: values and positions do not belong together, or positions do not rise within their group.
    """
    rows, width = _matrix(values, layer)
    bits = position_bits(pattern)
    expected = (rows, -(-width * bits // 8))
    if width % pattern.n or positions.dtype is not torch.uint8 or positions.shape != expected:
        raise PatternError(
            f"layer {layer!r}: {rows}x{width} values of {pattern} go with {expected[0]}x{expected[1]} bytes of "
            f"positions, found {'x'.join(map(str, positions.shape))} of {positions.dtype}"
        )
    places = _from_bits(positions, bits, width).reshape(rows, -1, pattern.n).long()
    if places.numel() and (int(places.max()) >= pattern.m or bool((places.diff(dim=-1) <= 0).any())):
        raise PatternError(f"layer {layer!r}: positions do not rise from 0 to {pattern.m - 1} within a group")
    shape = (rows, width // pattern.n, pattern.m)
    weight = values.new_zeros(shape).scatter_(2, places, values.reshape(places.shape))
    mask = torch.zeros(shape, dtype=torch.bool, device=values.device).scatter_(2, places, True)
    return weight.reshape(rows, -1), mask.reshape(rows, -1)


def mask_of(weight: Tensor, pattern: NMPattern, layer: str = "weight") -> Tensor:
    """A mask of exactly N a group that keeps every non-zero value; zeros fill up, the first ones first.

    Raises:
        PatternError: a group has more than N non-zero values.
    """
    mask = pattern.topn_mask((weight != 0).to(torch.uint8), layer)
    if bool((weight[~mask] != 0).any()):
        group = int(((weight != 0).reshape(-1, pattern.m).sum(1) > pattern.n).nonzero()[0])
        row, group = divmod(group, weight.shape[1] // pattern.m)
        raise PatternError(f"layer {layer!r}: group {group} of row {row} has more than {pattern.n} non-zero weights")
    return mask


@dataclass(frozen=True)
class PackedFile:
    """What a packed file holds.

    Attributes:
        tensors: a whole state dict, zeros put back.
        masks: boolean ``[..., out, in]`` by name.
        pattern: theirs.
        about: the file's metadata.
    """

    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    pattern: NMPattern
    about: Mapping[str, Any]


def load_packed_file(path: Path) -> PackedFile:
    """Read a packed file.

    Raises:
        CheckpointError: missing, truncated, tampered with, or no packed file.
    """
    with odd_header(path):
        return _packed_in(path)


def _packed_in(path: Path) -> PackedFile:
    tensors, about = load_verified(path, "packed")
    pattern = NMPattern(about["pattern"])
    masks, stored = {}, about.get("stored", {})
    for layer in about["layers"]:
        try:
            key = f"{layer}.weight" if layer + VALUES in tensors else layer
            values, positions = tensors.pop(key + ".values"), tensors.pop(key + ".positions")
            tensors[key], masks[layer] = unpack_weight(values, positions, pattern, layer)
            if layer in stored:
                tensors[key], masks[layer] = _restored(tensors[key], masks[layer], **stored[layer])
        except KeyError as error:
            raise CheckpointError(f"{path}: {error.args[0]!r} is missing") from error
        except PatternError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return PackedFile(tensors, masks, pattern, about)


def _restored(rows: Tensor, mask: Tensor, *, layout: Layout, shape: list[int]) -> tuple[Tensor, Tensor]:
    """A parameter as its model holds it, and its mask ``[..., out, in]``, of rows one below the other."""
    wanted = to_rows(rows.new_empty(shape, device="meta"), layout).shape
    whole = from_rows(rows.reshape(wanted), layout, torch.Size(shape)).contiguous()
    return whole, mask.reshape(wanted)


def load_packed(model: Model, path: Path | str) -> Model:
    """Load a packed file into a plain dense model, in place; returns it.

    ::

        model = maskllm4v.load_packed(timm.create_model("vit_base_patch16_224"), "packed.safetensors")

    Args:
        model: of the file's architecture; values are copied into its parameters, in their type and on their device.
        path: a file of ``python -m maskllm4v export --format packed``.

    Raises:
        CheckpointError: missing, truncated, tampered with, or of another model.
    """
    load_state(model, load_packed_file(Path(path)).tensors, str(path))
    return model


def _to_bits(numbers: Tensor, bits: int) -> Tensor:
    """Numbers ``[rows, count]`` (uint8) as bytes ``[rows, ceil(count · bits / 8)]``."""
    stream = (numbers[:, :, None] >> _shifts(bits, numbers) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    return (stream << _shifts(8, numbers)).sum(2, dtype=torch.uint8)


def _from_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    stream = (packed[:, :, None] >> _shifts(8, packed) & 1).flatten(1)[:, : count * bits]
    return (stream.unflatten(1, (count, bits)) << _shifts(bits, packed)).sum(2, dtype=torch.uint8)


def _shifts(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def _matrix(values: Tensor, layer: str) -> tuple[int, int]:
    if values.ndim != 2:
        raise PatternError(f"layer {layer!r}: packed values have {values.ndim} dimensions, not 2")
    return values.shape[0], values.shape[1]
