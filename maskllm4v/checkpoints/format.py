"""Sealed safetensors: tensors, and one metadata key that says what they are and vouches for them.

The key ``maskllm4v`` holds a JSON object with the ``kind`` of the file, what it belongs to, the digest of its tensors,
and a seal over all that. (Several keys would be written in random order.) No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskllm4v.utils.errors import CheckpointError, PatternError
from maskllm4v.utils.io import replacing, value_digest
from maskllm4v.utils.text import one_line

METADATA_KEY = "maskllm4v"
FORMAT = 2


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in hex; independent of order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_verified(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Write tensors and what is said about them, which has to name a ``kind``; returns the tensors' digest."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        shared = any(storage == other.untyped_storage().data_ptr() for other in plain.values())
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


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file, ours or not.

    Raises:
        CheckpointError: missing, damaged, or another format.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def load_verified(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file of :func:`save_verified`, and what it says about them, ``digest`` among it.

    Raises:
        CheckpointError: missing, damaged, tampered with, not ours, or of another kind.
    """
    tensors, metadata = open_tensors(path)
    try:
        about = json.loads(metadata[METADATA_KEY])
        seal = about.pop("seal")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} was not written by maskllm4v") from error
    if value_digest(about) != seal:
        raise CheckpointError(f"{path} is damaged: its header does not have the digest it was written with")
    if about.get("kind") != kind:
        raise CheckpointError(f"{path} is a file of {about.get('kind')!r}, not of {kind!r}")
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path} is in format {about.get('format')}, not {FORMAT}")
    about = _About(path, about)
    if tensors_digest(tensors) != about["digest"]:
        raise CheckpointError(f"{path} is damaged: its tensors do not have the digest it was written with")
    return tensors, about


class _About(dict[str, Any]):
    """What a file says of itself; asked for what it does not say, it names the file."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        super().__init__(about)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._path}: its header has no {key!r}")


@contextmanager
def odd_header(path: Path) -> Iterator[None]:
    """Inside, what cannot be done with the values in a header is a :class:`CheckpointError` that names the file."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its header does not fit its tensors: {one_line(error)[:200]}") from error
    except PatternError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def is_safetensors(path: Path) -> bool:
    """Whether a file's content, not its name, says so.

    Raises:
        CheckpointError: it is missing, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(9)[8:] == b"{"  # after the header's length
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def kind_of(path: Path) -> str | None:
    """What a file of ours says that it holds; None for those of others. Whoever loads it verifies it."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return about.get("kind") if isinstance(about, dict) else None
