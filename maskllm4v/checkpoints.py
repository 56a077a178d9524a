"""Our files: dense weights and packed masks, as safetensors. No pickle is read or written.

Each file carries one metadata key, ``maskllm4v``: a JSON object that says what the file is, what it
belongs to, and the digest of its tensors. (Several keys would be written in random order.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskllm4v.errors import CheckpointError
from maskllm4v.files import replacing, value_digest
from maskllm4v.patterns import NMPattern

METADATA_KEY = "maskllm4v"
FORMAT = 2


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
    """

    pattern: NMPattern | None
    masks: Mapping[str, Tensor]
    base: str
    method: str
    weights: Mapping[str, Tensor]
    prior: Mapping[str, Tensor]
    digest: str = ""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in hex; independent of order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_dense(path: Path, model: nn.Module, name: str) -> str:
    """Write a model's state dict; returns the digest of its tensors."""
    return _save(path, model.state_dict(), {"kind": "dense", "model": name})


def load_dense(path: Path, model: nn.Module, name: str) -> str:
    """Load a file of :func:`save_dense` into a model, strictly; returns the digest of its tensors.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    tensors, about = _load(path, "dense")
    if about["model"] != name:
        raise CheckpointError(f"{path} holds a {about['model']!r}, not a {name!r}")
    load_state(model, tensors, str(path))
    return str(about["digest"])


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """A strict ``load_state_dict`` whose error fits on a line."""
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(f"{origin} does not fit the model: {' '.join(lines)[:300]}") from error


def load_plain_state(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file; one of ours is verified, and has to hold dense weights."""
    tensors, metadata = _open(path)
    return _load(path, "dense")[0] if METADATA_KEY in metadata else tensors


def save_masks(path: Path, checkpoint: MaskCheckpoint) -> str:
    """Write packed masks and updated weights; returns the digest of the file's tensors."""
    c = checkpoint
    tensors = {f"weights.{name}": weight for name, weight in c.weights.items()}
    for kind, masks in (("mask", c.masks), ("prior", c.prior)):
        if masks and c.pattern is None:
            raise CheckpointError(f"{path}: masks without a pattern")
        if c.pattern is not None:
            tensors |= {f"{kind}.{name}": c.pattern.pack(mask, name) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in c.masks.items()}
    pattern = None if c.pattern is None else str(c.pattern)
    about = {"kind": "masks", "pattern": pattern, "method": c.method, "base": c.base, "shapes": shapes}
    return _save(path, tensors, about)


def load_masks(path: Path, *, pattern: NMPattern | str | None = None, base: str | None = None) -> MaskCheckpoint:
    """Read a file of :func:`save_masks`.

    Args:
        path: the file.
        pattern: if given, the pattern that it must have.
        base: if given, the digest of the dense model that it must belong to.

    Raises:
        CheckpointError: missing, damaged, of another pattern or of another dense model.
    """
    tensors, about = _load(path, "masks")
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

    weights = {name[len("weights.") :]: t for name, t in tensors.items() if name.startswith("weights.")}
    masks = unpack("mask")
    if masks.keys() != shapes.keys():
        raise CheckpointError(f"{path}: the masks of {sorted(shapes.keys() - masks.keys())} are missing")
    return MaskCheckpoint(found, masks, about["base"], about["method"], weights, unpack("prior"), about["digest"])


def _save(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> str:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        shared = any(own.data_ptr() == other.data_ptr() for other in plain.values())
        plain[name] = own.clone() if shared else own  # tied weights are written twice
    digest = tensors_digest(plain)
    about = {**about, "format": FORMAT, "digest": digest}
    text = json.dumps({**about, "seal": value_digest(about)}, sort_keys=True)
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata={METADATA_KEY: text})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return digest


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _load(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = _open(path)
    try:
        about = json.loads(metadata[METADATA_KEY])
        seal = about.pop("seal")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} was not written by maskllm4v") from error
    if value_digest(about) != seal:
        raise CheckpointError(f"{path} is damaged: its header does not have the digest it was written with")
    if about.get("kind") != kind or about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds {about.get('kind')} in format {about.get('format')}, not {kind} in {FORMAT}"
        )
    if tensors_digest(tensors) != about["digest"]:
        raise CheckpointError(f"{path} is damaged: its tensors do not have the digest it was written with")
    return tensors, about
