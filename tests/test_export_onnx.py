"""ONNX files: they compute what the model computes, hold its masked weights, and are the same bytes everywhere."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deployed
import pytest
import torch
from import_graph import ROOT
from torch import nn

import maskllm4v
import maskllm4v.export.onnx as exporter
from maskllm4v.export.onnx import about_graph, export_onnx, graph_weights
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.tasks.base import ExportableModel
from maskllm4v.utils.errors import CheckpointError, ConfigError, PatternError, UserError

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
P24 = NMPattern("2:4")


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, bool], tuple[Path, ExportableModel, dict[str, Any]]]:
    """Each model exported once."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[str, deployed.Case] = {}

    def export(name: str, half: bool) -> tuple[Path, ExportableModel, dict[str, Any]]:
        exportable, masks = made.setdefault(name, deployed.CASES[name]())
        path = folder / f"{name}-{half}.onnx"
        if not path.exists():
            export_onnx(path, exportable, half=half, masks=masks, pattern=P24, about={"model": name})
        return path, exportable, masks

    return export


@pytest.mark.parametrize("name", deployed.CASES)
def test_computes_what_the_model_computes(name: str, files: Any) -> None:
    path, exportable, _ = files(name, False)
    for count in (1, 2, 5):
        inputs = deployed.enlarged(exportable, count)
        found, wanted = deployed.run(path, inputs), deployed.in_torch(exportable, inputs)
        assert found.shape == wanted.shape
        assert found.dtype == torch.float32
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5
        assert torch.equal(found.flatten(1).argmax(1), wanted.flatten(1).argmax(1))


@pytest.mark.parametrize("name", deployed.CASES)
def test_half_computes_in_float16(name: str, files: Any) -> None:
    import onnx

    path, exportable, _ = files(name, True)
    for count in (1, 2, 5):
        inputs = deployed.enlarged(exportable, count)
        found, wanted = deployed.run(path, inputs), deployed.in_torch(exportable, inputs)
        assert found.dtype == torch.float32
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-2
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv", "LayerNormalization")]
    assert {types[node.output[0]] for node in products} == {onnx.TensorProto.FLOAT16}
    assert {weight.array.dtype.name for weight in graph_weights(path)} == {"float16"}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", deployed.CASES)
def test_holds_the_masked_weights(name: str, half: bool, files: Any) -> None:
    path, exportable, masks = files(name, half)
    found = {weight.layer: weight for weight in graph_weights(path)}
    model = getattr(exportable.module, "dit", exportable.module)
    for layer, mask in masks.items():
        weight = model.get_submodule(layer).weight
        assert torch.equal(found[layer].weight, weight.half() if half else weight)
        assert not found[layer].weight[~mask].signbit().any()
        assert found[layer].node.endswith(layer)
        assert found[layer].name.endswith(f"{layer}.weight")
    sparse = deployed.sparse_matrices(path, "2:4")
    assert all(sparse[weight] for weight in about_graph(path)["weights"].values())
    assert len(sparse) > len(masks)  # heads and the like stay dense
    said = about_graph(path)
    assert (said["model"], said["pattern"], said["precision"]) == (name, "2:4", "fp16" if half else "fp32")
    assert said["weights"].keys() == masks.keys()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_every_kind_of_linear_layer(pattern: str, tmp_path: Path) -> None:
    exportable, masks = deployed.toy(pattern)
    export_onnx(tmp_path / "m.onnx", exportable, masks=masks, pattern=NMPattern(pattern))
    found = {weight.node: weight for weight in graph_weights(tmp_path / "m.onnx")}
    assert {name: (w.op, w.k_axis) for name, w in found.items()} == {
        **dict.fromkeys(("tokens", "free"), ("MatMul", 0)),
        **dict.fromkeys(("pooled", "tied", "last", "alone"), ("Gemm", 1)),
    }
    assert found["tied"].name == found["last"].name
    for layer in masks:
        assert torch.equal(found[layer].weight, exportable.module.get_submodule(layer).weight)
    assert all(deployed.sparse_matrices(tmp_path / "m.onnx", pattern).values())
    inputs = deployed.enlarged(exportable, 5)
    torch.testing.assert_close(deployed.run(tmp_path / "m.onnx", inputs), deployed.in_torch(exportable, inputs))


def test_same_bytes_wherever_exported(tmp_path: Path) -> None:
    clone = tmp_path / "clone"  # the same code under other names of files, and so in other stack traces
    clone.mkdir()
    for name in ("maskllm4v", "tests", "experiments"):
        (clone / name).symlink_to(ROOT / name)
    code = (
        "import deployed; from pathlib import Path; from maskllm4v.export.onnx import export_onnx\n"
        "from maskllm4v.sparsity.patterns import NMPattern\n"
        "for name, half in (('digits', False), ('toy', True)):\n"
        "    deployable, masks = getattr(deployed, name)()\n"
        "    export_onnx(Path(f'{name}.onnx'), deployable, half=half, masks=masks, pattern=NMPattern('2:4'))"
    )
    paths = os.pathsep.join([str(clone / "tests"), str(clone)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, check=True)
    for name, half in (("digits", False), ("toy", True)):
        exportable, masks = getattr(deployed, name)()
        export_onnx(tmp_path / "here.onnx", exportable, half=half, masks=dict(reversed(masks.items())), pattern=P24)
        content = (tmp_path / "here.onnx").read_bytes()
        assert content == (clone / f"{name}.onnx").read_bytes()
        for text in (b".py", b"stack_trace", b"site-packages", str(ROOT).encode()):
            assert text not in content


def test_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    exportable, masks = deployed.toy()
    before = copy.deepcopy(exportable.module.state_dict())
    exportable.module.train()
    with torch.no_grad():
        exportable.module.tokens.weight[masks["tokens"].logical_not()] = -0.0
    export_onnx(tmp_path / "m.onnx", exportable, half=True, masks=masks, pattern=P24)
    assert exportable.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in exportable.module.state_dict().items())
    assert exportable.module.tokens.weight[~masks["tokens"]].signbit().all()


def test_example_of_one_sample_fixes_no_batch_size(tmp_path: Path) -> None:
    exportable, masks = deployed.toy()
    one = ExportableModel(exportable.module, {"tokens": exportable.inputs["tokens"][:1]}, ("scores",))
    export_onnx(tmp_path / "m.onnx", one, masks=masks, pattern=P24)
    assert len(deployed.run(tmp_path / "m.onnx", deployed.enlarged(exportable, 7))) == 7


def test_dense_models_need_no_masks(tmp_path: Path) -> None:
    exportable, _ = deployed.toy()
    export_onnx(tmp_path / "m.onnx", exportable)
    assert {weight.layer for weight in graph_weights(tmp_path / "m.onnx")} == {None}
    assert (about_graph(tmp_path / "m.onnx")["pattern"], about_graph(tmp_path / "m.onnx")["weights"]) == (None, {})


def test_tensors_beyond_the_limit_stand_next_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LIMIT", 0)
    exportable, masks = deployed.digits()
    for folder in ("a", "b"):
        export_onnx(tmp_path / folder / "m.onnx", exportable, masks=masks, pattern=P24)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["m.onnx", "m.onnx.data"]
    for name in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    inputs = deployed.enlarged(exportable, 2)
    wanted = deployed.in_torch(exportable, inputs)
    torch.testing.assert_close(deployed.run(tmp_path / "a" / "m.onnx", inputs), wanted)
    data = tmp_path / "a" / "m.onnx.data"
    assert len(graph_weights(tmp_path / "a" / "m.onnx")) == len(masks) + 1
    whole = data.read_bytes()
    for content in (whole[:-1], whole[:4] + b"\x01" + whole[5:], b""):
        data.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.onnx is damaged"):
            graph_weights(tmp_path / "a" / "m.onnx")


def refused(folder: Path, error: type[UserError], match: str, *arguments: Any, **options: Any) -> None:
    """Nothing is left of an export that fails."""
    with pytest.raises(error, match=match) as caught:
        export_onnx(folder / "out" / "m.onnx", *arguments, **options)
    assert "\n" not in str(caught.value)
    assert not list(folder.rglob("*m.onnx*"))


def test_refuses_a_layer_that_is_not_folded(tmp_path: Path) -> None:
    exportable, masks = deployed.toy()
    with torch.no_grad():
        row, column = (~masks["pooled"]).nonzero()[0].tolist()
        exportable.module.pooled.weight[row, column] = 1e-30
    refused(tmp_path, CheckpointError, "'pooled': the weight is not zero", exportable, masks=masks, pattern=P24)
    exportable, masks = deployed.toy()
    maskllm4v.apply_masks_(exportable.module, {"free": masks["free"]}, "2:4")
    refused(tmp_path, ConfigError, "'free' is a MaskedLinear", exportable, masks=masks, pattern=P24)


def test_refuses_masks_that_do_not_fit(tmp_path: Path) -> None:
    exportable, masks = deployed.toy()
    refused(
        tmp_path, ConfigError, "no linear layer 'nowhere'", exportable, masks={"nowhere": masks["free"]}, pattern=P24
    )
    refused(tmp_path, ConfigError, "without a pattern", exportable, masks=masks)
    refused(tmp_path, PatternError, "layer 'alone'|layer 'tokens'", exportable, masks=masks, pattern=NMPattern("1:4"))
    wrong = {"pooled": masks["pooled"].T}
    refused(tmp_path, CheckpointError, r"'pooled': mask \(24, 16\)", exportable, masks=wrong, pattern=P24)


def test_refuses_what_float16_cannot_hold(tmp_path: Path) -> None:
    exportable, masks = deployed.toy()
    with torch.no_grad():
        exportable.module.last.bias[0] = 1e5
    refused(tmp_path, CheckpointError, "'last.bias' holds values", exportable, half=True, masks=masks, pattern=P24)


class Choosy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_refuses_what_torch_cannot_export(tmp_path: Path) -> None:
    exportable = ExportableModel(Choosy(4, 4), {"x": torch.ones(2, 4)}, ("y",))
    refused(tmp_path, ConfigError, r"torch\.onnx cannot export the model", exportable)


def broken(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's exporter make a mistake."""
    export = exporter._export

    def wrong(*arguments: Any) -> Any:
        model = export(*arguments)
        change(model.graph)
        return model

    monkeypatch.setattr(exporter, "_export", wrong)


def changed(name: str, value: float) -> Callable[[Any], None]:
    from onnx import numpy_helper

    def change(graph: Any) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] += value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def fixed(graph: Any) -> None:
    """The batch size of the trace, in a Reshape before all else."""
    from onnx import helper, numpy_helper

    shape = numpy_helper.from_array(torch.tensor([4, 3, 8]).numpy(), "shape")
    graph.initializer.append(shape)
    node = next(node for node in graph.node if node.input[0] == "tokens")
    node.input[0] = "reshaped"
    graph.node.insert(0, helper.make_node("Reshape", ["tokens", "shape"], ["reshaped"], "reshape"))


def test_refuses_a_graph_that_is_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exportable, masks = deployed.toy()
    for change, match in [
        (changed("module.pooled.weight", 1e-7), "layer 'pooled': no node of the graph multiplies by its weight"),
        (changed("module.pooled.bias", 1e-3), r"for 1 samples onnxruntime's outputs are off by"),
        (fixed, r"onnxruntime does not run the graph"),
    ]:
        with monkeypatch.context() as patch:
            broken(change, patch)
            refused(tmp_path, CheckpointError, match, exportable, masks=masks, pattern=P24)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_says_what_to_install(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    refused(tmp_path, ConfigError, rf"need {name}: pip install -e '\.\[export\]'", deployed.toy()[0])
