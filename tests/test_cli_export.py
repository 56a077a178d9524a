"""The command export: rows and files of all kinds, and what it wrote, read back by validate and by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from commands import DENSE, MODEL, make_project, measured, run, well
from safetensors.torch import load_file

import maskllm4v
from maskllm4v.checkpoints.format import kind_of
from maskllm4v.checkpoints.masks import load_masks
from maskllm4v.checkpoints.packed import load_packed_file
from maskllm4v.export.onnx import about_graph

ARCHITECTURE = MODEL[:6]  # no data, no workers
OF_MASKS = ("--checkpoint", "prior.safetensors", *ARCHITECTURE, *DENSE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        common = (*MODEL, *DENSE, "-b", "3", "--nsamples", "3")
        well("prune", *common, "--pruner", "magnitude", "--save-model", "prior.safetensors")
        well("prune", *common, "--pruner", "sparsegpt", "--enable-update", "--save-model", "updated.safetensors")
    return folder


def sparse(checkpoint: str, *flags: str) -> dict[str, object]:
    return measured("--checkpoint", checkpoint, "--sparsity-mode", "sparse", *flags)


def test_every_format_is_the_same_model(here: Path) -> None:
    expected = sparse("prior.safetensors", *DENSE)
    for format in ("packed", "mask", "dense"):
        done = well("export", *OF_MASKS, "--format", format)
        name = f"prior-{format}.safetensors"
        assert done.out == f"{name}: {(here / name).stat().st_size:,} bytes, {_layers()} layers 2:4\n"
    assert sparse("prior-packed.safetensors") == expected
    assert sparse("prior-mask.safetensors", *DENSE) == expected
    assert measured("--checkpoint", "prior-dense.safetensors") == expected  # no masks in it: a plain state dict
    packed, dense = load_packed_file(here / "prior-packed.safetensors"), load_file(here / "prior-dense.safetensors")
    assert packed.tensors.keys() == dense.keys()
    assert all(torch.equal(packed.tensors[name], tensor) for name, tensor in dense.items())
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    assert maskllm4v.load_packed(model, here / "prior-packed.safetensors") is model


def _layers() -> int:
    return len(load_masks(Path("prior.safetensors")).masks)


def test_types(here: Path) -> None:
    sizes = {}
    for dtype, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        well("export", *OF_MASKS, "--dtype", dtype)
        path = here / f"prior-packed-{dtype}.safetensors"
        assert {tensor.dtype for tensor in load_packed_file(path).tensors.values()} == {kind}
        sizes[dtype] = path.stat().st_size
    assert abs(sizes["fp16"] - sizes["bf16"]) < 200  # the header names the type of each tensor
    assert 0.5 < sizes["fp16"] / sizes["fp32"] < 0.6


@pytest.mark.parametrize("format", ["packed", "dense", "onnx"])
def test_updated_weights_travel_with_their_masks(format: str, here: Path) -> None:
    flags = ("--checkpoint", "updated.safetensors", *ARCHITECTURE, *DENSE)
    suffix = "onnx" if format == "onnx" else "safetensors"
    well("export", *flags, "--format", format, "-o", f"out/it.{suffix}")
    if format == "packed":
        assert sparse("out/it.safetensors") == sparse("updated.safetensors", *DENSE)
    done = run("export", *flags, "--format", "mask", "-o", "out/mask.safetensors")
    assert done.code == 1
    assert "masks alone do not give the model" in done.err
    assert [path.name for path in (here / "out").iterdir()] == [f"it.{suffix}"]


def test_files_go_round(here: Path) -> None:
    """From a packed file, and from a plain state dict whose zeros are all that says where its masks were."""
    well("export", *OF_MASKS)
    well("export", *OF_MASKS, "--format", "dense")
    plain = load_file(here / "prior-dense.safetensors")
    torch.save(plain, here / "plain.pt")
    first = load_packed_file(here / "prior-packed.safetensors")
    for start in ("prior-packed.safetensors", "prior-dense.safetensors", "plain.pt"):
        well("export", "--checkpoint", start, *ARCHITECTURE, "-o", "again.safetensors")
        found = load_packed_file(here / "again.safetensors")
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in first.tensors.items())
        assert all(torch.equal(found.masks[name], mask) for name, mask in first.masks.items())
        done = run("export", "--checkpoint", start, *ARCHITECTURE, "--format", "mask")
        assert (done.code, "masks alone" in done.err) == (1, True)
    plain["blocks.1.mlp.fc1.weight"][2, 4:8] = 1.0
    torch.save(plain, here / "plain.pt")
    flags = ("--checkpoint", "plain.pt", *ARCHITECTURE, "-o", "broken.safetensors")
    done = run("export", *flags)
    assert done.code == 1
    fault = "export: plain.pt: layer 'blocks.1.mlp.fc1': group 1 of row 2 has more than 2 non-zero weights; if it is "
    assert done.err.splitlines()[-1].startswith(fault)
    assert not (here / "broken.safetensors").exists()
    well("export", *flags, "--exclude", "head", "blocks.1.mlp.fc1")
    assert len(load_packed_file(here / "broken.safetensors").masks) == len(first.masks) - 1


def test_other_patterns(here: Path) -> None:
    common = (*MODEL, *DENSE, "--pruner", "magnitude", "--save-model", "prior.safetensors")
    well("prune", *common, "--pattern", "1:4")
    well("export", *OF_MASKS, "--format", "dense")
    flags = ("--checkpoint", "prior-dense.safetensors", *ARCHITECTURE)
    well("export", *flags, "-o", "quarter.safetensors")  # as the file says
    well("export", *flags, "--pattern", "2:4", "-o", "half.safetensors")  # whatever is 1:4 is 2:4, too
    quarter, half = (load_packed_file(here / f"{name}.safetensors") for name in ("quarter", "half"))
    assert (str(quarter.pattern), str(half.pattern)) == ("1:4", "2:4")
    assert all(torch.equal(half.tensors[name], tensor) for name, tensor in quarter.tensors.items())
    done = run("export", *OF_MASKS, "--pattern", "2:8")
    assert done.code == 1
    assert "holds 1:4 masks, not 2:8 ones" in done.err


def test_what_a_file_says_of_itself_goes_on(here: Path) -> None:
    facts = {"model": "test_vit", "method": "magnitude", "base": load_masks(here / "prior.safetensors").base}
    for format in ("packed", "dense"):
        well("export", *OF_MASKS, "--format", format, "-o", "first.safetensors")
        well("export", "--checkpoint", "first.safetensors", *ARCHITECTURE, "-o", "second.safetensors")
        well("export", "--checkpoint", "second.safetensors", *ARCHITECTURE, "--format", "onnx", "-o", "third.onnx")
        about = load_packed_file(here / "second.safetensors").about
        graph = about_graph(here / "third.onnx")
        assert {key: about[key] for key in facts} == {key: graph[key] for key in facts} == facts
        assert about["args"] == graph["args"] == {"num_classes": 3, "img_size": 32}
    assert kind_of(here / "first.safetensors") == "dense"
    with torch.no_grad():
        halves = {name: tensor.bfloat16() for name, tensor in load_file(here / "first.safetensors").items()}
    torch.save(halves, here / "half.v1.pth.tar")
    well("export", "--checkpoint", "half.v1.pth.tar", *ARCHITECTURE)
    found = load_packed_file(here / "half.v1-packed.safetensors")  # in the file's own type, under its own name
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("a-row", "--pattern", "1:4"), "--pattern is for --checkpoint"),
        (("a-row", "--exclude", "foo"), "--exclude is for --checkpoint"),
        (("a-row", *ARCHITECTURE), "--model is for --checkpoint"),
        ((*OF_MASKS, "--seed-of-row", "7"), "--seed-of-row is for rows"),
        ((*OF_MASKS, "--params", "nope.yaml"), "--params is for rows"),
        ((*OF_MASKS, "--format", "mask", "--dtype", "bf16"), "--dtype is not for masks"),
        ((*OF_MASKS, "-o", "x.onnx"), "--output: x.onnx does not end in .safetensors, as 'packed' files do"),
        ((*OF_MASKS, "--format", "onnx", "-o", "x.pt"), "--output: x.pt does not end in .onnx, as 'onnx' files do"),
        ((), "say either a row of the experiment or --checkpoint FILE"),
        (("row", *OF_MASKS), "say either a row of the experiment or --checkpoint FILE"),
        (("--checkpoint", "prior.safetensors"), "--checkpoint needs --model"),
        (("--checkpoint", "nowhere.safetensors", *ARCHITECTURE), "nowhere.safetensors is missing"),
        (("--checkpoint", "prior.safetensors", *ARCHITECTURE), "is not beside it"),
        ((*OF_MASKS, "--format", "onnx", "--dtype", "bf16"), "ONNX is written in fp32 and fp16, not in bf16"),
        (("some-row",), "cannot read params.yaml"),
    ],
)
def test_wrong_use(flags: tuple[str, ...], text: str, here: Path) -> None:
    for path in here.glob("dense-*.safetensors"):
        path.unlink()
    done = run("export", *flags)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("export: ")
    assert text in last
