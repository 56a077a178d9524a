"""Folded models as files that stand for themselves: packed, or dense with zeros; and masks alone.

All are sealed safetensors (:mod:`maskllm4v.checkpoints.format`). A packed file holds ``<layer>.weight.values`` and
``<layer>.weight.positions`` of every masked layer (:mod:`maskllm4v.checkpoints.packed`) and all other tensors as they
are; a dense one is a plain state dict, which timm and ``torch`` load without us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.format import save_verified
from maskllm4v.checkpoints.masks import MaskCheckpoint, save_masks
from maskllm4v.checkpoints.packed import pack_weight
from maskllm4v.sparsity.layout import to_rows
from maskllm4v.sparsity.parameters import find_matrix
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError, PatternError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Folded:
    """A model as it is shipped: plain layers whose pruned weights are zero.

    Attributes:
        model: on the CPU.
        masks: boolean ``[out, in]`` by layer name; empty for a dense model.
        pattern: theirs; None without masks.
        name: of the architecture, e.g. timm's.
        args: that it is built with, as a JSON object.
        method: e.g. ``"maskllm"``; ``"dense"`` without masks.
        base: digest of the dense model's tensors; None where unknown.
        updated: whether masks alone would not give it: weights were changed, or the dense ones are lost.
        manifest, record: digests of the data's manifest, and of what the row's record measured
            (:func:`maskllm4v.runs.records.measurement_digest`); None where unknown.
        permutations: of the dense model's channels, after which the masks were made; empty if there are none, or the
            dense model is not known.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    pattern: NMPattern | None
    name: str
    method: str
    base: str | None
    updated: bool = False
    manifest: str | None = None
    record: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    permutations: Mapping[str, Tensor] = field(default_factory=dict)

    def about(self, kind: str) -> dict[str, Any]:
        """What a file says of itself; ``permuted``: layers whose inputs are in another order than the dense model's."""
        matrices = {name: find_matrix(self.model, name) for name in sorted(self.masks)}
        stored = {name: matrix.stored for name, matrix in matrices.items() if matrix.stored is not None}
        return {
            **({"stored": stored} if stored else {}),
            **({"permuted": sorted(self.permutations)} if self.permutations else {}),
            "kind": kind,
            "model": self.name,
            "args": dict(self.args),
            "method": self.method,
            "pattern": None if self.pattern is None else str(self.pattern),
            "layers": sorted(self.masks),
            "base": self.base,
            "manifest": self.manifest,
            "record": self.record,
        }

    def state(self, dtype: str | None) -> dict[str, Tensor]:
        """The state dict, floating-point tensors in ``dtype`` (None: as they are).

        Raises:
            CheckpointError: a value is too large for that type.
        """
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        if dtype is None:
            return state
        cast = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in state.items()}
        for name, tensor in cast.items():
            if bool((tensor.isinf() & ~state[name].isinf()).any()):
                raise CheckpointError(f"{name!r} holds values that are too large for {dtype}")
        return cast

    def need_masks(self, format: str) -> NMPattern:
        """The pattern.

        Raises:
            CheckpointError: the model is dense.
        """
        if self.pattern is None or not self.masks:
            raise CheckpointError(f"a model without masks cannot be written as {format!r}, only as 'dense' or 'onnx'")
        return self.pattern


def save_packed(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    path: Path | str,
    *,
    pattern: NMPattern | str = "2:4",
    dtype: str | None = None,
    name: str = "",
    method: str = "",
) -> None:
    """Write a folded model packed; :func:`maskllm4v.load_packed` reads it.

    ::

        masks = maskllm4v.prune(model, "wanda", calibration=images, exclude=["head"])
        maskllm4v.save_packed(maskllm4v.fold_(model), masks, "packed.safetensors")

    Args:
        model: with plain layers whose pruned weights are zero, see :func:`maskllm4v.fold_`.
        masks: boolean ``[out, in]`` by layer name, of the layers to pack.
        path: ``.safetensors``.
        pattern: theirs.
        dtype: of floating-point tensors: ``"fp32"``, ``"fp16"``, ``"bf16"``; None: as the model's.
        name, method: what the file says of itself: the architecture, and where the masks are from.

    Raises:
        CheckpointError: there are no masks, or a value is too large for ``dtype``.
        PatternError: a mask is of another pattern, or a weight is not zero where its mask is.
    """
    folded = Folded(model, masks, NMPattern(pattern), name or type(model).__name__, method or "unknown", None)
    write_packed(Path(path), folded, dtype)


def write_packed(path: Path, folded: Folded, dtype: str | None = None) -> None:
    """Write kept values, their positions, and everything else as it is.

    Args:
        path: ``.safetensors``.
        folded: what to write.
        dtype: ``"fp32"``, ``"fp16"``, ``"bf16"``; None: as the model's.

    Raises:
        CheckpointError: the model has no masks, or a value is too large for ``dtype``.
        PatternError: a weight is not zero where its mask is.
    """
    pattern, tensors = folded.need_masks("packed"), folded.state(dtype)
    for layer, mask in folded.masks.items():
        matrix = find_matrix(folded.model, layer)
        rows = to_rows(tensors.pop(matrix.key), matrix.layout).flatten(0, -2)
        packed = pack_weight(rows, mask.cpu().flatten(0, -2), pattern, layer)
        tensors[f"{matrix.key}.values"], tensors[f"{matrix.key}.positions"] = packed
    save_verified(path, tensors, {**folded.about("packed"), "dtype": dtype})


def write_folded(path: Path, folded: Folded, dtype: str | None = None) -> None:
    """Write the state dict with its zeros; arguments and errors as in :func:`write_packed`."""
    for layer, mask in folded.masks.items():
        if bool((find_matrix(folded.model, layer).rows.detach().cpu()[~mask.cpu()] != 0).any()):
            raise PatternError(f"layer {layer!r}: the weight is not zero where its mask is; fold the model first")
    save_verified(path, folded.state(dtype), {**folded.about("dense"), "dtype": dtype})


def write_masks(path: Path, folded: Folded) -> None:
    """Write the masks, ``NMPattern.bits`` bits a group, for those who have the dense model.

    Raises:
        CheckpointError: the model has none, or masks alone would not give it.
    """
    pattern = folded.need_masks("mask")
    if folded.updated or folded.base is None:
        raise CheckpointError(
            "masks alone do not give the model: its weights were updated, or its dense ones are lost; write 'packed'"
        )
    masks = {layer: mask.cpu() for layer, mask in folded.masks.items()}
    said = folded.about("masks")
    more = {key: said[key] for key in ("model", "args", "manifest", "record")}
    found = MaskCheckpoint(pattern, masks, folded.base, folded.method, {}, {}, permutations=folded.permutations)
    save_masks(path, found, more)
