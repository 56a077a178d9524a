"""Files of folded models: exact there and back, in every pattern and type; refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import maskllm4v
from maskllm4v.checkpoints.format import save_verified
from maskllm4v.checkpoints.masks import load_masks, load_plain_state
from maskllm4v.checkpoints.packed import load_packed, load_packed_file
from maskllm4v.checkpoints.third_party import LoadedWeights, load_any
from maskllm4v.export.files import DTYPES, Folded, write_folded, write_masks, write_packed
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError, PatternError

Change = Callable[[bytes], bytes]


class Odd(nn.Module):
    """Odd heights, a layer of one row, one without a bias, integers and half precision among the rest."""

    def __init__(self, pattern: NMPattern) -> None:
        super().__init__()
        self.wide = nn.Linear(3 * pattern.m, 7)
        self.norm = nn.BatchNorm1d(7)
        self.row = nn.Linear(5 * pattern.m, 1, bias=False)
        self.head = nn.Linear(7, 3)
        self.register_buffer("index", torch.arange(5))


def odd(text: str = "2:4", seed: int = 0, **facts: str) -> Folded:
    pattern, rng = NMPattern(text), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Odd(pattern)
    masks = {
        name: pattern.topn_mask(torch.rand(model.get_submodule(name).weight.shape, generator=rng))
        for name in ("wide", "row")
    }
    maskllm4v.fold_(maskllm4v.apply_masks_(model, masks, pattern))
    return Folded(model, masks, pattern, "Odd", "maskllm", "ab" * 32, **facts)  # type: ignore[arg-type]


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and found.numpy(force=True).tobytes() == (wanted.numpy(force=True).tobytes())
    )


def check(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        plain = (t.view(torch.int16) if t.dtype is torch.bfloat16 else t for t in (tensors[name], tensor))
        assert same_bits(*plain), name


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "1:2", "2:8", "4:8", "1:3"])
def test_packed_round_trip(text: str, dtype: str | None, tmp_path: Path) -> None:
    folded = odd(text)
    write_packed(tmp_path / "packed.safetensors", folded, dtype)
    found = load_packed_file(tmp_path / "packed.safetensors")
    check(dict(found.tensors), folded.state(dtype))
    assert found.pattern == NMPattern(text)
    assert all(torch.equal(found.masks[name], mask) for name, mask in folded.masks.items())


@settings(deadline=None, max_examples=25)
@given(text=st.sampled_from(["2:4", "1:4", "2:8", "3:5"]), seed=st.integers(0, 10**6))
def test_model_comes_back(text: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, folded = tmp_path_factory.mktemp("packed") / "p.safetensors", odd(text, seed)
    write_packed(path, folded)
    fresh = Odd(NMPattern(text))
    assert load_packed(fresh, path) is fresh
    check(fresh.state_dict(), folded.model.state_dict())


def test_one_line_loads_into_timm(tmp_path: Path) -> None:
    dense = timm.create_model("test_vit", num_classes=3)
    masks = maskllm4v.prune(dense, "magnitude", exclude=["head"])
    folded = Folded(maskllm4v.fold_(dense), masks, NMPattern("2:4"), "test_vit", "magnitude", "ab" * 32)
    write_packed(tmp_path / "packed.safetensors", folded, "fp16")
    write_folded(tmp_path / "dense.safetensors", folded, "fp16")
    model = maskllm4v.load_packed(timm.create_model("test_vit", num_classes=3), str(tmp_path / "packed.safetensors"))
    plain = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(tmp_path / "dense.safetensors"))
    check(model.state_dict(), plain.state_dict())  # timm knows nothing of us
    check(model.state_dict(), {name: t.half().float() for name, t in dense.state_dict().items()})
    assert all(type(layer) is nn.Linear for layer in model.modules() if isinstance(layer, nn.Linear))
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("packed", "dense")]
    assert 0.5625 < sizes[0] / sizes[1] < 0.75  # embeddings, norms and head are not pruned


def test_from_python(tmp_path: Path) -> None:
    """As in the docstring of ``save_packed``."""
    folded = odd("1:4")
    path = str(tmp_path / "packed.safetensors")
    maskllm4v.save_packed(folded.model, folded.masks, path, pattern="1:4", dtype="bf16", method="by hand")
    found = load_packed_file(tmp_path / "packed.safetensors")
    check(dict(found.tensors), folded.state("bf16"))
    facts = {"model": "Odd", "method": "by hand", "pattern": "1:4", "base": None}
    assert facts.items() <= found.about.items()
    with pytest.raises(PatternError, match="layer 'wide': group 0 of row 0 keeps 1 of 4 weights, not 2"):
        maskllm4v.save_packed(folded.model, folded.masks, path)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_masks_alone(text: str, tmp_path: Path) -> None:
    folded = odd(text, record="34" * 32)
    write_masks(tmp_path / "mask.safetensors", folded)
    found = load_masks(tmp_path / "mask.safetensors", pattern=text, base=folded.base)
    assert found.method == "maskllm"
    with safe_open(tmp_path / "mask.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["maskllm4v"])
    assert {key: about[key] for key in ("model", "record")} == {"model": "Odd", "record": "34" * 32}
    assert all(torch.equal(found.masks[name], mask) for name, mask in folded.masks.items())
    with pytest.raises(CheckpointError, match="masks alone do not give the model"):
        write_masks(tmp_path / "again.safetensors", Folded(**{**vars(folded), "updated": True}))
    assert not (tmp_path / "again.safetensors").exists()


def test_metadata_says_what_it_is(tmp_path: Path) -> None:
    folded = odd(manifest="12" * 32, record="34" * 32)
    for save, kind in ((write_packed, "packed"), (write_folded, "dense")):
        save(tmp_path / "a.safetensors", folded, "bf16")
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert list(metadata) == ["maskllm4v"]  # several keys would be written in random order
        about = json.loads(metadata["maskllm4v"])
        facts = {"kind": kind, "model": "Odd", "method": "maskllm", "pattern": "2:4", "base": "ab" * 32}
        facts |= {"manifest": "12" * 32, "record": "34" * 32, "dtype": "bf16", "layers": ["row", "wide"]}
        assert facts.items() <= about.items()
        first = (tmp_path / "a.safetensors").read_bytes()
        save(tmp_path / "a.safetensors", folded, "bf16")
        assert (tmp_path / "a.safetensors").read_bytes() == first


def test_every_file_of_ours_is_read_as_what_it_is(tmp_path: Path) -> None:
    folded = odd()
    write_packed(tmp_path / "packed", folded)
    write_folded(tmp_path / "dense", folded)
    found = load_any(tmp_path / "packed", pattern="2:4")
    assert isinstance(found, LoadedWeights)
    assert (found.learned, found.zeroed, str(found.pattern)) == (True, True, "2:4")
    check(dict(found.weights), folded.model.state_dict())
    check(load_plain_state(tmp_path / "dense"), folded.model.state_dict())
    with pytest.raises(CheckpointError, match="holds 2:4 masks, not 1:4 ones"):
        load_any(tmp_path / "packed", pattern="1:4")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b[:20],
        lambda b: b"",
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: b.replace(b"2:4", b"1:4"),
        lambda b: b.replace(b"maskllm\\", b"wanda12\\"),
        lambda b: b[:1000] + bytes([b[1000] ^ 4]) + b[1001:],
    ],
    ids=["last byte", "half", "header", "empty", "bit", "pattern", "method", "byte 1000"],
)
@pytest.mark.parametrize("save", [write_packed, write_folded])
def test_damaged_files_are_refused(save: Callable[[Path, Folded], None], change: Change, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save(path, odd())
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert path.read_bytes() != content
    with pytest.raises(CheckpointError, match=r"file\.safetensors"):
        load_any(path)


def test_files_that_are_not_packed(tmp_path: Path) -> None:
    folded = odd()
    write_folded(tmp_path / "dense", folded)
    with pytest.raises(CheckpointError, match="is a file of 'dense', not of 'packed'"):
        load_packed(Odd(NMPattern("2:4")), tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is missing"):
        load_packed(Odd(NMPattern("2:4")), tmp_path / "nowhere")
    write_packed(tmp_path / "packed", folded)
    other = Odd(NMPattern("2:8"))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"size mismatch for 'row\.weight': \(1, 20\), not"):
        load_packed(other, tmp_path / "packed")
    check(other.state_dict(), before)  # nothing of it was loaded
    with pytest.raises(CheckpointError, match="is a folder"):
        load_packed(other, tmp_path)
    about = {"kind": "packed", "pattern": "2:4", "layers": ["row"]}
    save_verified(tmp_path / "sealed", {"row.weight.values": torch.ones(1, 10)}, about)
    with pytest.raises(CheckpointError, match=r"'row\.weight\.positions' is missing"):
        load_packed_file(tmp_path / "sealed")
    bad = {"row.weight.values": torch.ones(1, 2), "row.weight.positions": torch.zeros(1, 1, dtype=torch.uint8)}
    save_verified(tmp_path / "sealed", bad, about)
    with pytest.raises(CheckpointError, match="sealed: layer 'row': positions do not rise"):
        load_packed_file(tmp_path / "sealed")


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    path, folded = tmp_path / "file.safetensors", odd()
    dense = Folded(folded.model, {}, None, "Odd", "dense", "ab" * 32)
    for save in (write_packed, lambda path, folded: write_masks(path, folded)):
        with pytest.raises(CheckpointError, match="a model without masks cannot be written as"):
            save(path, dense)
    write_folded(path, dense)
    path.unlink()
    with torch.no_grad():
        folded.model.head.weight[0, 0] = 1e6
    write_packed(path, folded, "bf16")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"'head\.weight' holds values that are too large for fp16"):
        write_packed(path, folded, "fp16")
    with torch.no_grad():
        folded.model.row.weight.fill_(1)
    for save in (write_packed, write_folded):
        with pytest.raises(PatternError, match="layer 'row': the weight is not zero where its mask is"):
            save(path, folded)
    assert not path.exists()
