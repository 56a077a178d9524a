"""The command verify on files of every kind: what it prints, and its exit status for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Done, run
from import_graph import ROOT
from mask_files import BASE, checkpoint, random_mask
from original_files import gated, gates_of, pruned, timm_file, winners
from safetensors.torch import save_file
from torch import Tensor, nn

from maskllm4v.checkpoints.format import save_verified
from maskllm4v.checkpoints.masks import save_dense, save_masks
from maskllm4v.export.files import Folded, write_folded, write_packed
from maskllm4v.sparsity.patterns import NMPattern

P24 = NMPattern(2, 4)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sparse(rows: int = 8, width: int = 16, pattern: str = "2:4") -> Tensor:
    n, m = map(int, pattern.split(":"))
    return (torch.rand(rows, width) + 0.1) * random_mask(rows, width, n, m)


def state(**layers: Tensor) -> dict[str, Tensor]:
    """Two sparse layers and a dense one, next to what is none."""
    weights = {"fc1": sparse(), "fc2": sparse(4, 8), "head": torch.rand(3, 4) + 0.1} | layers
    found = {f"{name}.weight": weight for name, weight in weights.items()}
    return found | {"fc1.bias": torch.ones(8), "norm.weight": torch.ones(4), "conv.weight": torch.ones(2, 3, 2, 2)}


def broken() -> Tensor:
    weight = sparse()
    weight[5, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    return weight


def checks(*flags: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """By layer, from JSON, which is all that is printed."""
    done = run("verify", *flags, "--json")
    assert (done.code, done.err) == (code, "")
    return {check["layer"]: check for check in json.loads(done.out)}


def refused(*flags: str) -> str:
    """The one line that is printed where nothing could be checked."""
    done = run("verify", *flags)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    return done.err.removesuffix("\n")


def verdicts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {layer: check["verdict"] for layer, check in found.items()}


def folded() -> Folded:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 3))
    masks = {"0": random_mask(8, 16, 2, 4), "1": random_mask(4, 8, 2, 4)}
    with torch.no_grad():
        for layer, mask in masks.items():
            model[int(layer)].weight.mul_(mask)
        model[2].weight[:, 0] = 0  # needs not hold, though few would call it dense
    return Folded(model, masks, P24, "mlp", "maskllm", BASE)


def test_table() -> None:
    save_file(state(fc1=broken()), "m.safetensors")
    done = run("verify", "m.safetensors")
    assert done.code == 1
    assert done.out.splitlines() == [
        "layer  shape  pattern  verdict   axis  density  first violation",
        "fc1    8×16   2:4      violated  –     0.5078   row 5, group 2: 3 of 4 non-zero",
        "fc2    4×8    2:4      holds     in    0.5000   –",
        "head   3×4    2:4      dense     –     1.0000   row 0, group 0: 4 of 4 non-zero",
        "m.safetensors: 2:4 is violated (layers: 1 hold, 1 violated, 1 dense)",
    ]
    done = run("verify", "m.safetensors", "--exclude", "fc1", "head.weight")
    assert (done.code, done.out.splitlines()[2:]) == (
        0,
        ["m.safetensors: 2:4 holds (layers: 1 hold, 0 violated, 0 dense)"],
    )


def test_json() -> None:
    save_file(state(fc1=broken()), "m.safetensors")
    found = checks("m.safetensors", code=1)
    assert found["fc1"] == {
        "layer": "fc1",
        "shape": [8, 16],
        "pattern": "2:4",
        "verdict": "violated",
        "axis": None,
        "density": 65 / 128,
        "required": False,
        "violation": "row 5, group 2: 3 of 4 non-zero",
    }
    assert (found["fc2"]["axis"], found["fc2"]["violation"]) == ("in", None)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_our_masks(pattern: str) -> None:
    save_masks(Path("m.safetensors"), checkpoint(pattern, weights=True, prior=True))
    found = checks("m.safetensors")
    assert verdicts(found) == {"blocks.0.fc": "holds", "head": "holds"}
    assert {(check["pattern"], check["required"]) for check in found.values()} == {(pattern, True)}
    other = checks("m.safetensors", "--pattern", "3:4", code=1)  # masks keep exactly that many
    assert verdicts(other) == {"blocks.0.fc": "violated", "head": "violated"}


def test_our_file_of_a_model_without_masks() -> None:
    weights = {"fc.weight": torch.rand(4, 8) + 0.1}
    save_masks(Path("m.safetensors"), replace(checkpoint(), pattern=None, masks={}, weights=weights))
    assert verdicts(checks("m.safetensors", code=1)) == {"fc": "dense"}


@pytest.mark.parametrize("write", [write_packed, write_folded])
@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
def test_our_weights(write: Callable[..., None], dtype: str | None) -> None:
    write(Path("m.safetensors"), folded(), dtype)
    found = checks("m.safetensors")
    assert verdicts(found) == {"0": "holds", "1": "holds", "2": "dense"}
    assert [found[layer]["required"] for layer in "012"] == [True, True, False]
    assert verdicts(checks("m.safetensors", "--layers", "*", code=1))["2"] == "violated"
    assert verdicts(checks("m.safetensors", "--pattern", "1:4", code=1))["0"] == "violated"


def test_our_weights_where_a_named_layer_is_dense() -> None:
    """Of others it would be taken for one that was never pruned."""
    weights = state(fc2=torch.ones(4, 8))
    about = {"kind": "dense", "model": "mlp", "pattern": "2:4", "layers": ["fc1", "fc2"]}
    save_verified(Path("m.safetensors"), weights, about)
    assert verdicts(checks("m.safetensors", code=1)) == {"fc1": "holds", "fc2": "violated", "head": "dense"}
    save_verified(Path("n.safetensors"), weights, {**about, "layers": ["fc1", "fc3"]})
    assert refused("n.safetensors") == "verify: n.safetensors is damaged: it names layer 'fc3', but has no weight of it"


def test_our_dense_model_is_not_sparse() -> None:
    save_dense(Path("dense.safetensors"), nn.Linear(8, 4), "fc")
    done = run("verify", "dense.safetensors")
    said = "dense.safetensors: nothing is 2:4 sparse (layers: 0 hold, 0 violated, 1 dense)"
    assert (done.code, done.out.splitlines()[-1]) == (1, said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_others(dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in state().items()}
    save_file(weights, "m.safetensors", metadata={"format": "pt"})
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, "m.pth.tar")
    torch.save(weights, "m.pt")
    for path in ("m.safetensors", "m.pth.tar", "m.pt"):
        found = checks(path)
        assert verdicts(found) == {"fc1": "holds", "fc2": "holds", "head": "dense"}
        assert verdicts(checks(path, "--layers", "h*", code=1))["head"] == "violated"
        assert verdicts(checks(path, "--pattern", "1:2", code=1))["head"] == "dense"


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_tensors(layout: Callable[[Tensor], Tensor]) -> None:
    torch.save(state(fc1=layout(sparse())), "m.pt")
    assert verdicts(checks("m.pt"))["fc1"] == "holds"


def test_axis_swapped_odd_width_and_one_row() -> None:
    kernel = sparse(12, 16).t().contiguous()
    save_file(state(kernel=kernel, odd=torch.eye(6), row=sparse(1, 8)), "m.safetensors")
    found = checks("m.safetensors", code=1)
    assert (found["kernel"]["verdict"], found["kernel"]["axis"]) == ("violated", "out")
    assert found["kernel"]["violation"].endswith("holds along out instead of in (transposed?)")
    assert found["odd"]["violation"] == "its 6 input features are no multiple of 4"
    assert found["row"]["verdict"] == "holds"


def test_masks_of_the_original() -> None:
    """Its weights stay dense; the masks count."""
    masks = {"blocks.0.fc": random_mask(8, 16, 2, 4), "blocks.1.fc": random_mask(6, 8, 2, 4)}
    others = pruned(masks)
    others["head.weight"][:, 0] = 0  # nothing that has no mask has to hold
    torch.save(others, "m.pt")
    assert verdicts(checks("m.pt")) == {"blocks.0.fc": "holds", "blocks.1.fc": "holds", "head": "dense"}
    masks["blocks.1.fc"][2, 4:] = torch.tensor([True, False, False, False])
    torch.save(pruned(masks), "m.pt")
    found = checks("m.pt", code=1)["blocks.1.fc"]
    assert (found["verdict"], found["violation"]) == ("violated", "row 2, group 1: 1 of 4 kept")
    torch.save(pruned(masks) | {"head.mask": torch.ones(3, 5)}, "m.pt")
    assert refused("m.pt") == "verify: m.pt: layer 'head' has a mask of another shape than its weight"


@pytest.mark.parametrize("averaged", [False, True])
def test_logits_of_the_original(averaged: bool) -> None:
    logits = gated(gates_of(winners()))
    timm_file(Path("m.pth.tar"), logits, **({"state_dict_ema": logits} if averaged else {}))
    found = checks("m.pth.tar")
    assert verdicts(found) == {"blocks.0.fc": "holds", "blocks.1.fc": "holds", "head": "dense"}
    assert [check["density"] for check in found.values()] == [0.5, 0.5, 1.0]
    torch.save(
        logits | {f"{layer}.mask_options": P24.candidates().float() for layer in found if layer != "head"}, "two.pt"
    )
    assert checks("two.pt", "--pattern", "1:4", code=1)["blocks.0.fc"]["violation"] == "row 0, group 0: 2 of 4 kept"
    one = {name: torch.randn(tensor.numel() // 6, 4) for name, tensor in logits.items() if name.endswith(".gate")}
    torch.save(logits | one, "one.pt")
    assert checks("one.pt", "--pattern", "1:4")["blocks.0.fc"]["density"] == 0.25
    assert "has 4 logits a group, but 2:4 has 6 candidates" in refused("one.pt")


def test_our_graphs() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    from maskllm4v.export.onnx import export_onnx
    from maskllm4v.tasks.base import ExportableModel

    ours = folded()
    exportable = ExportableModel(ours.model.eval(), {"images": torch.rand(2, 16)}, ("logits",))
    export_onnx(Path("m.onnx"), exportable, masks=ours.masks, pattern=P24, about=ours.about("onnx"))
    found = checks("m.onnx")
    assert verdicts(found) == {"0": "holds", "1": "holds", "2": "dense"}
    assert [check["required"] for check in found.values()] == [True, True, False]
    assert {check["axis"] for check in found.values()} == {"K", None}
    Path("m.onnx").write_bytes(Path("m.onnx").read_bytes()[:-20])
    assert refused("m.onnx").startswith("verify: m.onnx ")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_files_that_cannot_be_read() -> None:
    write_packed(Path("m.safetensors"), folded())
    content = Path("m.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[:-9])
    Path("flipped.safetensors").write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    Path("renamed.safetensors").write_bytes(content.replace(b"maskllm4v", b"maskllm5v"))
    Path("other.safetensors").write_bytes(content.replace(b"2:4", b"3:4"))
    torch.save(state(), "m.pt")
    Path("cut.pt").write_bytes(Path("m.pt").read_bytes()[:-100])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_bytes(b"no checkpoint")
    Path("folder.safetensors").mkdir()
    torch.save({"fc.weight": Code()}, "code.pt")
    assert refused("absent.pt") == "verify: absent.pt is missing"
    assert refused("folder.safetensors") == "verify: cannot read folder.safetensors: Is a directory"
    assert refused("empty.pt") == "verify: empty.pt is empty"
    assert refused("cut.safetensors").startswith("verify: cut.safetensors is damaged")
    assert "its tensors do not have the digest" in refused("flipped.safetensors")
    assert "its header does not have the digest" in refused("other.safetensors")
    assert "code.pt holds code (print), which is not run" in refused("code.pt", "--json")
    for path in ("cut.pt", "text.pt"):
        assert refused(path).startswith(f"verify: {path} is damaged")
    assert run("verify", "renamed.safetensors").code == 1  # nobody's: what is packed in it are no weights


def test_wrong_usage() -> None:
    save_file(state(), "m.safetensors")
    assert refused("m.safetensors", "--pattern", "4:2").startswith("verify: pattern 4:2: N counts kept weights")
    assert refused("m.safetensors", "--layers", "tail") == (
        "verify: layers: 'tail' matches no weight of two dimensions in m.safetensors"
    )
    assert "exclude: 'conv' matches no weight" in refused("m.safetensors", "--exclude", "conv")
    assert "the following arguments are required: FILE" in refused()
    assert "unrecognized arguments: --fast" in refused("m.safetensors", "--fast")


def test_real_process() -> None:
    """What a script sees: 0, 1 and 2, and nothing on standard error unless it is 2."""
    save_file(state(), "good.safetensors")
    save_file(state(fc1=broken()), "bad.safetensors")

    def verify(path: str) -> Done:
        command = [sys.executable, "-m", "maskllm4v", "verify", path]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
        return Done(done.returncode, done.stdout, done.stderr)

    good, bad, absent = map(verify, ("good.safetensors", "bad.safetensors", "absent.safetensors"))
    assert ((good.code, good.err), (bad.code, bad.err)) == ((0, ""), (1, ""))
    assert good.out.endswith("good.safetensors: 2:4 holds (layers: 2 hold, 0 violated, 1 dense)\n")
    assert (absent.code, absent.out, absent.err) == (2, "", "verify: absent.safetensors is missing\n")


def test_a_crash_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("maskllm4v.export.verify.verify_file", crash)
    done = run("verify", str(tmp_path / "any"))
    assert done.code == 2
    assert done.out == ""
