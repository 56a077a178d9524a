"""Our safetensors files: what goes in comes out, and anything else is refused by name."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskllm4v.checkpoints import (
    MaskCheckpoint,
    load_dense,
    load_masks,
    load_plain_state,
    load_state,
    save_dense,
    save_masks,
    tensors_digest,
)
from maskllm4v.errors import CheckpointError, UserError
from maskllm4v.patterns import NMPattern

BASE = "ab" * 32


def model(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False))


def random_mask(rows: int, columns: int, n: int, m: int) -> Tensor:
    kept = torch.rand(rows * columns // m, m).argsort(1) < n
    return kept.reshape(rows, columns)


def checkpoint(
    pattern: str = "2:4", *, weights: bool = False, prior: bool = False, order: int = 1, method: str = "wanda"
) -> MaskCheckpoint:
    """Two layers; ``order=-1`` lists them the other way round."""
    torch.manual_seed(1)
    n, m = (int(part) for part in pattern.split(":"))
    names = {"blocks.0.fc": (6, 16), "head": (3, 8)}
    masks = {name: random_mask(*shape, n, m) for name, shape in names.items()}
    priors = {name: random_mask(*shape, n, m) for name, shape in names.items()}
    values = {name: torch.randn(shape) for name, shape in names.items()}

    def part(wanted: bool, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(list(tensors.items())[::order]) if wanted else {}

    return MaskCheckpoint(
        NMPattern(pattern), part(True, masks), BASE, method, part(weights, values), part(prior, priors)
    )


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# Round trips


def test_dense_round_trip(tmp_path: Path) -> None:
    first, second = model(), model()
    with torch.no_grad():
        first[1].running_mean.add_(3)
        first[1].num_batches_tracked.add_(5)
    digest = save_dense(tmp_path / "a", first, "mlp")
    assert not same(first.state_dict(), second.state_dict())
    assert load_dense(tmp_path / "a", second, "mlp") == digest
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_masks_round_trip(pattern: str, weights: bool, prior: bool, tmp_path: Path) -> None:
    wanted = checkpoint(pattern, weights=weights, prior=prior)
    digest = save_masks(tmp_path / "a", wanted)
    found = load_masks(tmp_path / "a", pattern=pattern, base=BASE)
    assert (found.pattern, found.base, found.method, found.digest) == (NMPattern(pattern), BASE, "wanda", digest)
    assert same(found.masks, wanted.masks)
    assert same(found.weights, wanted.weights)
    assert same(found.prior, wanted.prior)
    assert all(mask.dtype is torch.bool for mask in found.masks.values())


def test_masks_take_less_than_a_bit_a_weight(tmp_path: Path) -> None:
    mask = random_mask(256, 256, 2, 4)
    save_masks(tmp_path / "a", MaskCheckpoint(NMPattern("2:4"), {"fc": mask}, BASE, "wanda", {}, {}))
    assert (tmp_path / "a").stat().st_size < 0.75 * mask.numel() / 8 + 1024


def test_updated_weights_may_be_parameters_and_views(tmp_path: Path) -> None:
    wanted = checkpoint()
    parameter = nn.Parameter(torch.randn(16, 6).t())
    save_masks(tmp_path / "a", MaskCheckpoint(**{**vars(wanted), "weights": {"blocks.0.fc": parameter}}))
    assert torch.equal(load_masks(tmp_path / "a").weights["blocks.0.fc"], parameter.detach())


def test_layers_that_share_a_weight_round_trip(tmp_path: Path) -> None:
    first, second = (nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2))
    for tied in (first, second):
        tied.append(tied[0])
    save_dense(tmp_path / "a", first, "tied")
    load_dense(tmp_path / "a", second, "tied")
    assert same(first.state_dict(), second.state_dict())


# Bytes


def test_same_content_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    for name, order in (("a", 1), ("b", -1)):
        save_masks(tmp_path / name, checkpoint(weights=True, prior=True, order=order))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_same_content_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent.parent), str(Path(__file__).parent)]!r}
from pathlib import Path
from test_checkpoints import *
torch.manual_seed(3)
save_dense(Path({str(tmp_path / "dense2")!r}), model(), "mlp")
save_masks(Path({str(tmp_path / "masks2")!r}), checkpoint(weights=True, prior=True))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    torch.manual_seed(3)
    save_dense(tmp_path / "dense1", model(), "mlp")
    save_masks(tmp_path / "masks1", checkpoint(weights=True, prior=True))
    for kind in ("dense", "masks"):
        assert (tmp_path / f"{kind}1").read_bytes() == (tmp_path / f"{kind}2").read_bytes()


def test_method_and_base_are_part_of_the_bytes(tmp_path: Path) -> None:
    for method in ("wanda", "maskllm"):
        save_masks(tmp_path / method, checkpoint(method=method))
    assert (tmp_path / "wanda").read_bytes() != (tmp_path / "maskllm").read_bytes()
    assert load_masks(tmp_path / "maskllm").method == "maskllm"


def test_digest_knows_names_types_shapes_and_values() -> None:
    values = torch.arange(6, dtype=torch.int32)
    digests = [
        tensors_digest(tensors)
        for tensors in (
            {"a": values},
            {"b": values},
            {"a": values.view(torch.float32)},
            {"a": values.view(2, 3)},
            {"a": values.flip(0)},
            {"a": values, "b": values},
            {},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert tensors_digest({"b": values, "a": values}) == digests[5]
    assert tensors_digest({"a": torch.stack([values, values], 1)[:, 0]}) == digests[0]  # a view


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_digest_takes_all_types_and_scalars(dtype: torch.dtype) -> None:
    assert tensors_digest({"a": torch.tensor(1, dtype=dtype)}) != tensors_digest({"a": torch.tensor(0, dtype=dtype)})


# Files that are refused


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
    rewrite(path, lambda tensors, _: tensors.pop("head.mask"))
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
    rewrite(tmp_path / "a", lambda tensors, _: tensors.update({"blocks.0.fc.mask": packed}))
    with pytest.raises(UserError, match=r"blocks\.0\.fc"):
        load_masks(tmp_path / "a")


def test_dense_and_masks_are_told_apart(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", model(), "mlp")
    save_masks(tmp_path / "masks", checkpoint())
    with pytest.raises(CheckpointError, match=r"dense holds dense .* not masks"):
        load_masks(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"masks holds masks .* not dense"):
        load_dense(tmp_path / "masks", model(), "mlp")


def test_dense_of_another_name_is_refused(tmp_path: Path) -> None:
    save_dense(tmp_path / "a", model(), "mlp")
    with pytest.raises(CheckpointError, match="a holds a 'mlp', not a 'vit'"):
        load_dense(tmp_path / "a", model(), "vit")


def test_dense_of_another_shape_is_refused_on_one_line(tmp_path: Path) -> None:
    save_dense(tmp_path / "a", model(), "mlp")
    with pytest.raises(CheckpointError, match=r"a does not fit the model: .*0\.weight") as caught:
        load_dense(tmp_path / "a", model(32), "mlp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_state_is_loaded_strictly(change: str) -> None:
    state = dict(model().state_dict())
    state.pop("0.bias") if change == "missing" else state.update(odd=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"here does not fit the model: .*(0\.bias|odd)"):
        load_state(model(), state, "here")


def test_state_of_a_large_other_model_is_refused_in_one_short_line() -> None:
    big = nn.Sequential(*(nn.Linear(3, 3) for _ in range(200)))
    with pytest.raises(CheckpointError, match=r"^here does not fit the model: .") as caught:
        load_state(big, model().state_dict(), "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_masks_of_another_pattern_are_refused(tmp_path: Path) -> None:
    save_masks(tmp_path / "a", checkpoint("2:4"))
    with pytest.raises(CheckpointError, match="a holds 2:4 masks, not 4:8 ones"):
        load_masks(tmp_path / "a", pattern="4:8")
    assert load_masks(tmp_path / "a", pattern=NMPattern(2, 4)).masks


def test_masks_of_another_base_are_refused(tmp_path: Path) -> None:
    save_masks(tmp_path / "a", checkpoint())
    with pytest.raises(CheckpointError, match=r"a belongs to another dense model \(abababababab, not cdcdcdcdcdcd\)"):
        load_masks(tmp_path / "a", base="cd" * 32)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    save_dense(path, model(), "mlp")
    before = path.read_bytes()

    def half(tensors: object, name: Path, metadata: object) -> None:
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskllm4v.checkpoints.save_file", half)
    with pytest.raises(ValueError, match=r"cannot write .*a: No space left on device"):
        save_dense(path, model(), "mlp")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_plain_state_is_any_safetensors_file_and_no_pickle(tmp_path: Path) -> None:
    state = {"w": torch.randn(3), "b": torch.arange(4)}
    save_file(state, tmp_path / "plain")
    assert same(load_plain_state(tmp_path / "plain"), state)
    torch.save(state, tmp_path / "plain.pt")
    for name in ("plain.pt", "nothing"):
        with pytest.raises(CheckpointError, match=name):
            load_plain_state(tmp_path / name)
