"""Our files: dense weights and packed masks, as sealed safetensors (:mod:`maskllm4v.checkpoints.format`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.format import METADATA_KEY, load_verified, odd_header, open_tensors, save_verified
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError
from maskllm4v.utils.text import few

CANDIDATES = "candidates"  # the gate that files do not name
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, timm's EMA, torch.compile


@dataclass(frozen=True)
class MaskCheckpoint:
    """The masks of one row and seed.

    Attributes:
        pattern: their N:M pattern; None if there are no masks.
        masks: boolean ``[out, in]`` by layer name; empty for a dense model that was trained on.
        weights: what replaces the dense model's own tensors, by name in its state dict; empty if all
            weights stayed as they were.
        prior: the masks that learning started from; empty for one-shot rows.
        base: digest of the dense model's tensors.
        method: e.g. ``"wanda"`` or ``"maskllm"``.
        digest: of the file's tensors, once it has been read.
        gate: what the logits stood for that masks were learned with (:mod:`maskllm4v.sparsity.parameterization`).
        permutations: of the dense model's channels, see :func:`maskllm4v.apply_permutations_`; masks, weights and prior
            lie on the permuted model. Empty if it stayed as it was.
    """

    pattern: NMPattern | None
    masks: Mapping[str, Tensor]
    base: str
    method: str
    weights: Mapping[str, Tensor]
    prior: Mapping[str, Tensor]
    digest: str = ""
    gate: str = CANDIDATES
    permutations: Mapping[str, Tensor] = field(default_factory=dict)


def save_dense(path: Path, model: nn.Module, name: str) -> str:
    """Write a model's state dict; returns the digest of its tensors."""
    return save_verified(path, model.state_dict(), {"kind": "dense", "model": name})


def load_dense(path: Path, model: nn.Module, name: str) -> str:
    """Load a file of :func:`save_dense` into a model, strictly; returns the digest of its tensors.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    tensors, about = load_verified(path, "dense")
    if about["model"] != name:
        raise CheckpointError(f"{path} holds a {about['model']!r}, not a {name!r}")
    load_state(model, tensors, str(path))
    return str(about["digest"])


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """A strict ``load_state_dict`` whose error fits on a line, and that changes nothing if anything does not fit."""
    own = model.state_dict()
    shapes = {name: (tuple(tensors[name].shape), tuple(own[name].shape)) for name in own.keys() & tensors.keys()}
    sizes = [f"{name!r}: {a}, not {b}" for name, (a, b) in sorted(shapes.items()) if a != b]
    told = {
        "size mismatch for": few(sizes, quoted=False),
        "it lacks": few([name for name in own if name not in tensors]),
        "the model has no": few([name for name in tensors if name not in own]),
    }
    if faults := [f"{what} {names}" for what, names in told.items() if names]:
        if prefix := _fitting_prefix(own, tensors):
            faults.append(prefix)
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(faults)}")
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(f"{origin} does not fit the model: {' '.join(lines)[:300]}") from error


def _fitting_prefix(own: Collection[str], found: Collection[str]) -> str:
    """What to say of a prefix in which most of a file's names differ from the model's; empty if there is none."""
    said, most = "", len(own) // 2
    for how, longer, shorter in (("without", found, own), ("behind", own, found)):
        prefixes = Counter(
            name[: i + 1]
            for name in longer
            if name not in shorter
            for i, character in enumerate(name)
            if character == "." and name[i + 1 :] in shorter
        )
        for prefix, count in prefixes.most_common(1):
            if count > most:
                said = f"{how} the prefix {prefix!r}, {count:,} of its {len(found):,} names would fit"
                most = count
    return said


def load_plain_state(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file; one of ours is verified, and has to hold dense weights.

    Names are :func:`unwrapped` in those of others.
    """
    tensors, metadata = open_tensors(path)
    return load_verified(path, "dense")[0] if METADATA_KEY in metadata else unwrapped(tensors)


def unwrapped(state: Mapping[Any, Any]) -> dict[str, Any]:
    """A state dict without the prefixes that wrappers put before all of its names."""
    names = {str(name): value for name, value in state.items()}
    while prefix := next((p for p in WRAPPERS if names and all(name.startswith(p) for name in names)), ""):
        names = {name[len(prefix) :]: value for name, value in names.items()}
    return names


def save_masks(path: Path, checkpoint: MaskCheckpoint, more: Mapping[str, Any] = {}) -> str:
    """Write packed masks, updated weights and permutations; returns the digest of the file's tensors.

    ``more``: what else the file is to say of itself, as a JSON object.
    """
    c = checkpoint
    tensors = {f"weights.{name}": weight for name, weight in c.weights.items()}
    tensors |= {f"permutation.{name}": order.to(torch.int32) for name, order in c.permutations.items()}
    for kind, masks in (("mask", c.masks), ("prior", c.prior)):
        if masks and c.pattern is None:
            raise CheckpointError(f"{path}: masks without a pattern")
        if c.pattern is not None:
            tensors |= {f"{kind}.{name}": c.pattern.pack(mask, name) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in c.masks.items()}
    pattern = None if c.pattern is None else str(c.pattern)
    about = {**more, "kind": "masks", "pattern": pattern, "method": c.method, "base": c.base, "shapes": shapes}
    return save_verified(path, tensors, about if c.gate == CANDIDATES else {**about, "gate": c.gate})


def load_masks(path: Path, *, pattern: NMPattern | str | None = None, base: str | None = None) -> MaskCheckpoint:
    """Read a file of :func:`save_masks`.

    Args:
        path: the file.
        pattern: if given, the pattern that it must have.
        base: if given, the digest of the dense model that it must belong to.

    Raises:
        CheckpointError: missing, damaged, of another pattern or of another dense model.
    """
    with odd_header(path):
        return _masks_in(path, pattern, base)


def _masks_in(path: Path, pattern: NMPattern | str | None, base: str | None) -> MaskCheckpoint:
    tensors, about = load_verified(path, "masks")
    found = None if about["pattern"] is None else NMPattern(about["pattern"])
    if pattern is not None and found != NMPattern(pattern):
        raise CheckpointError(f"{path} holds {found} masks, not {pattern} ones")
    if base is not None and about["base"] != base:
        raise CheckpointError(f"{path} belongs to another dense model ({about['base'][:12]}, not {base[:12]})")
    shapes = about["shapes"]

    def unpack(kind: str) -> dict[str, Tensor]:
        if found is None:
            return {}
        names = {name: tensors[f"{kind}.{name}"] for name in shapes if f"{kind}.{name}" in tensors}
        return {name: found.unpack(packed, tuple(shapes[name]), name) for name, packed in names.items()}

    def plain(kind: str) -> dict[str, Tensor]:
        return {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}.")}

    masks = unpack("mask")
    if masks.keys() != shapes.keys():
        raise CheckpointError(f"{path}: the masks of {sorted(shapes.keys() - masks.keys())} are missing")
    return MaskCheckpoint(
        found,
        masks,
        about["base"],
        about["method"],
        plain("weights"),
        unpack("prior"),
        about["digest"],
        about.get("gate", CANDIDATES),
        {name: order.long() for name, order in plain("permutation").items()},
    )
