"""Files of others: MaskLLM-4V's checkpoints, timm's, plain state dicts. No code in them is run.

The original's pruning script writes a ``.pt`` whose linear layers have a ``.mask`` next to their ``.weight``;
its training, timm's ``.pth.tar``, in which they have a ``.gate``: one logit a candidate and group, ``[groups, K]``,
candidates in our order. Masks are made from the logits wherever there are any: the masks beside them are those of
the last evaluation, and timm averages them, too, which leaves no masks.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskllm4v.checkpoints.format import is_safetensors, kind_of, load_verified
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks, load_plain_state, unwrapped
from maskllm4v.checkpoints.packed import load_packed_file
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError, PatternError

AVERAGED, PLAIN = ("state_dict_ema", "model_ema", "ema"), ("state_dict", "model")  # where a file keeps its state dicts
DEFAULT = NMPattern(2, 4)


@dataclass(frozen=True)
class LoadedWeights:
    """A file of weights that is none of ours, or a dense or packed one of ours.

    Attributes:
        path: the file.
        weights: a dense model's state dict: nothing that belongs to masks.
        masks: boolean ``[out, in]`` by layer name; empty if the file has none.
        pattern: theirs; None without masks.
        learned: whether the masks are the likeliest candidates of trained logits.
        averaged: whether this is the average that timm keeps (EMA).
        about: what a file of ours says of itself, see :meth:`maskllm4v.export.files.Folded.about`; else empty.
    """

    path: Path
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    pattern: NMPattern | None
    learned: bool = False
    averaged: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def zeroed(self) -> bool:
        """Whether some layer's pruned weights, and they alone, are zero, so that the dense ones are lost.

        That weights were updated (``--enable-update``) cannot be seen in a file; see :meth:`updated`.
        """
        layers = ((self.weights[f"{name}.weight"], mask) for name, mask in self.masks.items())
        return any(bool(weight.any()) and not weight[~mask].any() for weight, mask in layers)

    def updated(self, dense: Mapping[str, Tensor]) -> list[str]:
        """The masked layers whose kept weights are not those of a dense state dict."""

        def differs(name: str, mask: Tensor) -> bool:
            own, other = self.weights[f"{name}.weight"], dense.get(f"{name}.weight")
            return other is None or own.shape != other.shape or not own[mask].equal(other.cpu()[mask].to(own))

        return [name for name, mask in self.masks.items() if differs(name, mask)]

    def checkpoint(self, base: str) -> MaskCheckpoint:
        """The masks as if they were ours, on the dense model whose tensors have the digest ``base``."""
        method = "maskllm" if self.learned else "one-shot"
        return MaskCheckpoint(self.pattern, self.masks, base, method, weights={}, prior={})


def load_any(
    path: Path, *, ema: bool | None = None, pattern: NMPattern | str | None = None
) -> LoadedWeights | MaskCheckpoint:
    """Read any file of weights or masks; what it is, its content says, not its name.

    Args:
        path: ours (safetensors), the original's ``.pt`` or ``.pth.tar``, or any state dict.
        ema: for files that hold an average of the weights: whether to take it; None: if there is one.
        pattern: that the masks must have; needed for masks of others that are not 2:4.

    Returns:
        Our mask files as :class:`MaskCheckpoint`, everything else as :class:`LoadedWeights`.

    Raises:
        CheckpointError: missing, damaged, with code in it, or with masks that do not fit or violate N:M.
    """
    wanted = None if pattern is None else NMPattern(pattern)
    if not is_safetensors(path):
        state, averaged = read_torch(path, ema)
        return _separate(path, state, wanted, averaged)
    if ema:
        raise CheckpointError(f"{path} holds no averaged weights (EMA)")
    kind = kind_of(path)
    if kind == "masks":
        return load_masks(path, pattern=wanted)
    if kind == "packed":
        return _packed(path, wanted)
    if kind == "dense":
        tensors, about = load_verified(path, "dense")
        return replace(_separate(path, tensors, wanted), about=about)
    return _separate(path, load_plain_state(path), wanted)


def dense_state(path: Path) -> Mapping[str, Tensor]:
    """The dense weights in any file; timm's average goes first.

    Raises:
        CheckpointError: as :func:`load_any`; or it holds masks only, or weights that are pruned already.
    """
    found = load_any(path)
    if isinstance(found, MaskCheckpoint):
        raise CheckpointError(f"{path} holds masks, not dense weights")
    return unpruned(found)


def unpruned(found: LoadedWeights) -> Mapping[str, Tensor]:
    """The weights of a file, if they are dense.

    Raises:
        CheckpointError: pruned weights are zero in it.
    """
    if found.masks and found.zeroed:
        raise CheckpointError(f"{found.path}: pruned weights are zero in it, so the dense ones are lost")
    return found.weights


def _packed(path: Path, wanted: NMPattern | None) -> LoadedWeights:
    found = load_packed_file(path)
    if wanted not in (None, found.pattern):
        raise CheckpointError(f"{path} holds {found.pattern} masks, not {wanted} ones")
    learned = found.about["method"] == "maskllm"
    return LoadedWeights(path, found.tensors, found.masks, found.pattern, learned, about=found.about)


def read_torch(path: Path, ema: bool | None = None) -> tuple[dict[str, Tensor], bool]:
    """The state dict in a file of ``torch.save``, and whether it is an average; ``ema`` as in :func:`load_any`.

    Tensors stay mapped to the file.

    Raises:
        CheckpointError: missing, damaged, with code in it, or no state dict.
    """
    _check_unpacked_size(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles, which are then refused
            # Namespace: timm keeps its arguments so. Mapped: nobody needs the optimiser that lies there, too.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds code ({code[1]}), which is not run;" if code else "is damaged, or holds more than it should;"
        raise CheckpointError(f"{path} {what} a checkpoint is made of tensors and plain values") from error
    except Exception as error:  # an unpickler stumbles in any way; what is called .safetensors is read as that
        said = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint: {said}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
    averaged, plain = (
        next((found[key] for key in keys if isinstance(found.get(key), Mapping)), None) for keys in (AVERAGED, PLAIN)
    )
    if averaged is None and ema:
        raise CheckpointError(f"{path} holds no averaged weights (EMA)")
    if averaged is not None and plain is None and ema is False:
        raise CheckpointError(f"{path} holds nothing but averaged weights (EMA)")
    is_average = averaged is not None and ema is not False
    state = unwrapped((averaged if is_average else plain) or found)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor of a state dict")
    return state, is_average


def _check_unpacked_size(path: Path) -> None:
    """PyTorch stores tensors as they are; an archive that says it is larger inside was made to fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sum(member.file_size for member in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):  # none, or damaged: whoever loads it says so
        return
    if inside > (size := path.stat().st_size):
        raise CheckpointError(f"{path} has {size:,} bytes and would take {inside:,}; PyTorch compresses nothing")


def _separate(
    path: Path, state: Mapping[str, Tensor], wanted: NMPattern | None, averaged: bool = False
) -> LoadedWeights:
    """Dense weights on one side, masks on the other."""
    state = {name.replace(".weight_mask.mask", ".mask"): tensor for name, tensor in state.items()}  # of our own models
    gated, masked = ([name.removesuffix(kind) for name in state if name.endswith(kind)] for kind in (".gate", ".mask"))
    layers = gated or masked
    if odd := sorted(set(masked) - set(layers)):
        raise CheckpointError(f"{path}: layer {odd[0]!r} has a mask, but no logits (.gate) as {layers[0]!r} has")
    masks, pattern = dict[str, Tensor](), wanted
    for name in layers:
        weight = state.get(f"{name}.weight")
        if weight is None or weight.dim() != 2:
            raise CheckpointError(f"{path}: layer {name!r} has a mask, but no weight of a linear layer")
        if gated:
            gate = state[f"{name}.gate"]
            pattern, candidates = _candidates(path, name, gate, state.get(f"{name}.mask_options"), pattern)
            mask = _likeliest(path, name, gate, candidates, weight.shape)
        else:
            pattern, mask = pattern or DEFAULT, state[f"{name}.mask"]
            if mask.shape != weight.shape:
                shapes = f"a mask {_size(mask.shape)} for a weight {_size(weight.shape)}"
                raise CheckpointError(f"{path}: layer {name!r} has {shapes}")
        masks[name] = _valid(path, name, mask, pattern)
    # A linear layer has a weight and a bias; the rest there (mask, gate, mask_options, ...) is the mask's.
    weights = {
        name: tensor
        for name, tensor in state.items()
        if name.rpartition(".")[0] not in masks or name.rpartition(".")[2] in ("weight", "bias")
    }
    return LoadedWeights(path, weights, masks, pattern if masks else None, bool(gated), averaged)


def _candidates(
    path: Path, name: str, gate: Tensor, options: Tensor | None, wanted: NMPattern | None
) -> tuple[NMPattern, Tensor]:
    """A layer's pattern and its candidate masks, boolean ``[K, M]`` in the order of the logits."""
    try:
        if options is None:
            pattern = wanted or DEFAULT
            candidates = pattern.candidates()
        else:  # an average of equal numbers differs by rounding
            candidates = torch.atleast_2d(options.float().round().bool())
            pattern = wanted or NMPattern(int(candidates[0].sum()), candidates.shape[1])
            if sorted(candidates.tolist()) != sorted(pattern.candidates().tolist()):
                raise PatternError
    except (IndexError, PatternError) as error:
        raise CheckpointError(
            f"{path}: layer {name!r}: mask_options are not the candidates of {wanted or 'a pattern'}"
        ) from error
    count = gate.shape[-1] if gate.dim() else 0
    if count != len(candidates):
        raise CheckpointError(
            f"{path}: layer {name!r} has {count} logits a group, but {pattern} has {len(candidates)} candidates"
        )
    return pattern, candidates


def _likeliest(path: Path, name: str, gate: Tensor, candidates: Tensor, shape: torch.Size) -> Tensor:
    """The mask of each group's largest logit; the first one, of equal ones."""
    count, m = candidates.shape
    if shape[1] % m or gate.numel() != shape.numel() // m * count:
        raise CheckpointError(f"{path}: layer {name!r} has logits {_size(gate.shape)} for a weight {_size(shape)}")
    if not bool(torch.isfinite(gate).all()):
        raise CheckpointError(f"{path}: layer {name!r} has logits that are not finite")
    return candidates[gate.reshape(-1, count).argmax(1)].reshape(shape)


def _valid(path: Path, name: str, mask: Tensor, pattern: NMPattern) -> Tensor:
    try:
        pattern.validate(mask, name)
    except PatternError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return mask.bool()


def _size(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "of one number"
