"""Damaged or foreign files are refused by name, whatever byte it is; a failed save destroys nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_files import BASE, checkpoint, model, same
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskllm4v.checkpoints.format import tensors_digest
from maskllm4v.checkpoints.masks import load_dense, load_masks, save_dense, save_masks
from maskllm4v.utils.errors import CheckpointError, UserError


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def flip_payload(path: Path) -> None:
    flip(path, -1)


def not_safetensors(path: Path) -> None:
    path.write_bytes(b"This is text, " * 100)


def as_pickle(path: Path) -> None:
    torch.save(model().state_dict(), path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def foreign(path: Path) -> None:
    save_file({"0.weight": torch.ones(8, 16)}, path)


def foreign_with_metadata(path: Path) -> None:
    save_file({"0.weight": torch.ones(8, 16)}, path, metadata={"format": "pt"})


def metadata_list(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"maskllm4v": "[]"})


def metadata_text(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"maskllm4v": "hello"})


def other_format(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"maskllm4v": json.dumps({"kind": "masks", "format": 999})})


SPOILS = [
    truncate,
    halve,
    cut_header,
    empty,
    remove,
    flip_payload,
    not_safetensors,
    as_pickle,
    as_folder,
    foreign,
    foreign_with_metadata,
    metadata_list,
    metadata_text,
    other_format,
]


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("kind", ["dense", "masks"])
def test_spoilt_file_is_named(kind: str, spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.safetensors"
    save_dense(path, model(), "mlp") if kind == "dense" else save_masks(path, checkpoint())
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        load_dense(path, model(), "mlp") if kind == "dense" else load_masks(path)
    assert str(path) in str(caught.value)


def test_every_flipped_byte_of_the_payload_is_found(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    save_masks(path, checkpoint(prior=True))
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for position in range(8 + header, len(content)):
        flip(path, position)
        with pytest.raises(CheckpointError, match="damaged"):
            load_masks(path)
        flip(path, position)
    assert load_masks(path).masks


@pytest.mark.parametrize("bit", [1, 4, 64])
def test_flipped_byte_of_the_masks_header_is_found_or_harmless(bit: int, tmp_path: Path) -> None:
    """Harmless: whatever is read is what was written, down to the method's name."""
    path, wanted = tmp_path / "masks", checkpoint(prior=True, weights=True)
    digest = save_masks(path, wanted)

    def read() -> bool:
        found = load_masks(path)
        facts = (found.pattern, found.base, found.method, found.digest)
        tensors = ((found.masks, wanted.masks), (found.prior, wanted.prior), (found.weights, wanted.weights))
        return facts == (wanted.pattern, BASE, "wanda", digest) and all(same(a, b) for a, b in tensors)

    check_header(path, read, bit)


@pytest.mark.parametrize("bit", [1, 4, 64])
def test_flipped_byte_of_the_dense_header_is_found_or_harmless(bit: int, tmp_path: Path) -> None:
    path, first, second = tmp_path / "dense", model(), model()
    digest = save_dense(path, first, "mlp")

    def read() -> bool:
        with torch.no_grad():
            second[0].weight.zero_()
        return load_dense(path, second, "mlp") == digest and same(first.state_dict(), second.state_dict())

    check_header(path, read, bit)


def check_header(path: Path, read: Callable[[], bool], bit: int) -> None:
    """Flip every byte of a file's header in turn; ``read`` says whether all was read as written."""
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert read()
    wrong = {}
    for position in range(8 + header):
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        try:
            if not read():
                wrong[position] = "read as something else"
        except CheckpointError as error:
            if str(path) not in str(error) or "\n" in str(error):
                wrong[position] = f"unclear: {error}"
        except Exception as error:
            wrong[position] = f"{type(error).__name__}: {error}"
    by_fault: dict[str, int] = {}
    for text in wrong.values():
        by_fault[text] = by_fault.get(text, 0) + 1
    assert not wrong, f"{len(wrong)} of {8 + header} bytes: {dict(itertools.islice(by_fault.items(), 8))}"


@pytest.mark.parametrize("kind", ["dense", "masks"])
def test_file_cut_short_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    save_dense(path, model(), "mlp") if kind == "dense" else save_masks(path, checkpoint(prior=True))
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{kind} is damaged"):
            load_dense(path, model(), "mlp") if kind == "dense" else load_masks(path)


def rewrite(path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], object], *, seal: bool = True) -> None:
    """Edit a masks file; with ``seal``, as one who can compute its digests."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["maskllm4v"])
    edit(tensors, about)
    if seal:
        about["digest"] = tensors_digest(tensors)
        rest = {key: value for key, value in about.items() if key != "seal"}
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
        about["seal"] = hashlib.sha256(canonical).hexdigest()
    save_file(tensors, path, metadata={"maskllm4v": json.dumps(about, sort_keys=True)})


def test_rewritten_file_without_edit_is_read(tmp_path: Path) -> None:
    save_masks(tmp_path / "a", checkpoint())
    rewrite(tmp_path / "a", lambda *_: None)
    assert same(load_masks(tmp_path / "a").masks, checkpoint().masks)


def test_missing_mask_is_named(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    save_masks(path, checkpoint(weights=True, prior=True))
    rewrite(path, lambda tensors, _: tensors.pop("mask.head"))
    with pytest.raises(CheckpointError, match=r"masks.*head.*missing") as caught:
        load_masks(path)
    assert "blocks.0.fc" not in str(caught.value)


@pytest.mark.parametrize("key", ["kind", "format", "digest", "base", "method", "pattern", "shapes", "seal"])
def test_missing_or_edited_fact_is_found(key: str, tmp_path: Path) -> None:
    for edit in (lambda _, about: about.pop(key), lambda _, about: about.update({key: "2:8"})):
        path = tmp_path / "some.masks"
        save_masks(path, checkpoint())
        rewrite(path, edit, seal=False)
        with pytest.raises(CheckpointError, match=r"some\.masks"):
            load_masks(path)


@pytest.mark.parametrize("packed", [torch.full((9,), 255, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)])
def test_mask_that_cannot_be_unpacked_names_its_layer(packed: Tensor, tmp_path: Path) -> None:
    """Six of eight codes of three bits name a 2:4 candidate; 7 does not."""
    save_masks(tmp_path / "a", checkpoint())
    rewrite(tmp_path / "a", lambda tensors, _: tensors.update({"mask.blocks.0.fc": packed}))
    with pytest.raises(UserError, match=r"blocks\.0\.fc"):
        load_masks(tmp_path / "a")


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    save_dense(path, model(), "mlp")
    before = path.read_bytes()

    def half(tensors: object, name: Path, metadata: object) -> None:
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskllm4v.checkpoints.format.save_file", half)
    with pytest.raises(ValueError, match=r"cannot write .*a: No space left on device"):
        save_dense(path, model(), "mlp")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
