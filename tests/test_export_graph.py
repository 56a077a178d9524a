"""Constant matrices of any ONNX graph, whichever way it multiplies by them; damaged and changed files are refused."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import deployed
import numpy as np
import pytest
import torch

from maskllm4v.export.graph import about_graph, graph_weights
from maskllm4v.export.onnx import export_onnx
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
FLOAT = 1
W = np.arange(12, dtype=np.float32).reshape(3, 4) + 1  # [K, N] or [N, K], as a node has it
node = onnx.helper.make_node


def write(path: Path, nodes: list[Any], inner: int = 3, **constants: np.ndarray) -> Path:
    """A graph from ``x`` ``[2, inner]`` to ``y`` ``[rows, columns]``."""
    shape = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [shape("x", FLOAT, [2, inner])],
        [shape("y", FLOAT, ["rows", "columns"])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    return path


TURNED = node("Transpose", ["w"], ["t"], perm=[1, 0])
LEFT = node("Transpose", ["x"], ["c"])
GRAPHS = {  # nodes, width of x, shape of w, and the axis of w that is summed over
    "right": ([node("MatMul", ["x", "w"], ["y"])], 3, (3, 4), 0),
    "left": ([LEFT, node("MatMul", ["w", "c"], ["y"])], 3, (4, 3), 1),
    "turned": ([TURNED, node("MatMul", ["x", "t"], ["y"])], 3, (4, 3), 1),
    "turned twice": ([TURNED, node("Transpose", ["t"], ["s"]), node("MatMul", ["x", "s"], ["y"])], 3, (3, 4), 0),
    "turned nowhere": ([node("Transpose", ["w"], ["t"], perm=[0, 1]), node("MatMul", ["x", "t"], ["y"])], 3, (3, 4), 0),
    "copied": (
        [node("Identity", ["w"], ["t"]), node("Cast", ["t"], ["s"], to=1), node("MatMul", ["x", "s"], ["y"])],
        3,
        (3, 4),
        0,
    ),
    "gemm": ([node("Gemm", ["x", "w"], ["y"])], 3, (3, 4), 0),
    "gemm, B turned": ([node("Gemm", ["x", "w"], ["y"], transB=1)], 3, (4, 3), 1),
    "gemm, turned twice": ([TURNED, node("Gemm", ["x", "t"], ["y"], transB=1)], 3, (3, 4), 0),
    "gemm, left": ([LEFT, node("Gemm", ["w", "c"], ["y"])], 3, (4, 3), 1),
    "gemm, A turned": ([LEFT, node("Gemm", ["w", "c"], ["y"], transA=1)], 3, (3, 4), 0),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_axis_that_is_summed_over(name: str, tmp_path: Path) -> None:
    nodes, inner, shape, k_axis = GRAPHS[name]
    (found,) = graph_weights(write(tmp_path / "m.onnx", nodes, inner, w=W.reshape(shape)))
    assert (found.name, found.op, found.k_axis, found.layer) == ("w", nodes[-1].op_type, k_axis, None)
    np.testing.assert_array_equal(found.array, W.reshape(shape))
    assert found.weight.shape == (4, 3)
    x = torch.randn(2, inner)
    outputs = deployed.run(tmp_path / "m.onnx", {"x": x})
    wanted = x @ found.weight.t()
    torch.testing.assert_close(outputs, wanted.t() if "left" in name or "A turned" in name else wanted)


def test_constant_nodes_subgraphs_and_functions(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array
    shape = onnx.helper.make_tensor_value_info
    branch = onnx.helper.make_graph(
        [node("MatMul", ["x", "w"], ["b"], "inside")], "branch", [], [shape("b", FLOAT, [2, 4])]
    )
    nodes = [
        node("Constant", [], ["k"], value=tensor(W)),
        node("MatMul", ["x", "k"], ["z"], "first"),
        node("If", ["yes"], ["v"], then_branch=branch, else_branch=branch),
        node("Add", ["z", "v"], ["u"]),
        node("times", ["x", "f"], ["n"], "call", domain="own"),
        node("Add", ["u", "n"], ["y"]),
    ]
    write(tmp_path / "m.onnx", nodes, w=W, f=W + 1, yes=np.array(True))
    model = onnx.load(tmp_path / "m.onnx")
    opset = onnx.helper.make_opsetid("", 20)
    inner = [node("MatMul", ["a", "b"], ["c"], "deep")]
    model.functions.append(onnx.helper.make_function("own", "times", ["a", "b"], ["c"], inner, [opset]))
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    onnx.save(model, tmp_path / "m.onnx")
    found = graph_weights(tmp_path / "m.onnx")
    assert [weight.name for weight in found] == ["k", "w", "w", "f"]
    assert [weight.node for weight in found[:3]] == ["first", "inside", "inside"]


def test_no_matrix_where_nothing_is_constant_or_has_two_dimensions(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["z"]), node("Transpose", ["x"], ["t"]), node("MatMul", ["t", "x"], ["s"])]
    path = write(tmp_path / "m.onnx", [*nodes, node("Identity", ["s"], ["y"])], w=W[None])
    assert graph_weights(path) == []
    assert about_graph(path) == {}


def test_types_that_numpy_lacks_come_as_float32(tmp_path: Path) -> None:
    nodes = [node("Cast", ["w"], ["t"], to=FLOAT), node("MatMul", ["x", "t"], ["y"])]
    write(tmp_path / "m.onnx", nodes, w=W)
    model = onnx.load(tmp_path / "m.onnx")
    values = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [3, 4], W.ravel().tolist())
    model.graph.initializer[0].CopyFrom(values)
    onnx.save(model, tmp_path / "m.onnx")
    (found,) = graph_weights(tmp_path / "m.onnx")
    torch.testing.assert_close(found.weight, torch.from_numpy(W.T.copy()), rtol=0, atol=0)


def test_a_matrix_in_parts_is_one_matrix(tmp_path: Path) -> None:
    """Parts of its outputs; parts of its inputs, which a node sums over, are no whole groups."""
    parts = [node("MatMul", ["x", "a"], ["c"]), node("MatMul", ["x", "b"], ["d"])]
    join = node("Concat", ["c", "d"], ["y"], axis=1)
    of_outputs = [node("Split", ["w"], ["a", "b"], axis=1, num_outputs=2), *parts, join]
    found = graph_weights(write(tmp_path / "m.onnx", of_outputs, w=W))
    assert [(weight.name, weight.k_axis, weight.array.shape) for weight in found] == [("w", 0, (3, 4))] * 2
    turned = [TURNED, node("Split", ["t"], ["a", "b"], axis=1, num_outputs=2), *parts, join]
    found = graph_weights(write(tmp_path / "m.onnx", turned, w=W.T.copy()))
    assert [(weight.name, weight.k_axis, weight.array.shape) for weight in found] == [("w", 1, (4, 3))] * 2
    of_inputs = [node("Split", ["w"], ["a", "b"], axis=0, num_outputs=2), *parts, join]
    assert graph_weights(write(tmp_path / "m.onnx", of_inputs, inner=2, w=W.T.copy())) == []


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exportable, masks = deployed.toy()
    path = tmp_path_factory.mktemp("ours") / "ours.onnx"
    export_onnx(path, exportable, masks=masks, pattern=NMPattern("2:4"), about={"row": "a row"})
    return path


def test_refuses_what_is_no_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.onnx is missing"):
        graph_weights(tmp_path / "m.onnx")
    for content in (b"", b"{}", b"\x08\x0a", bytes(100), b"PK\x03\x04"):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.onnx is damaged or no ONNX file"):
            graph_weights(tmp_path / "m.onnx")


def test_refuses_truncated_files(ours: Path, tmp_path: Path) -> None:
    content = ours.read_bytes()
    text = content.index(b"maskllm4v", 100)
    for length in {*range(0, len(content), 197), *range(text - 30, text + 10), len(content) - 1}:
        (tmp_path / "m.onnx").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            graph_weights(tmp_path / "m.onnx")


def test_no_changed_byte_goes_unseen(ours: Path, tmp_path: Path) -> None:
    """But for what says nothing about the graph: its name, the producer's version."""
    content = ours.read_bytes()
    rng, unseen = np.random.default_rng(0), 0
    for place in rng.choice(len(content), 300, replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "m.onnx").write_bytes(changed)
        with suppress(CheckpointError):
            graph_weights(tmp_path / "m.onnx")
            unseen += 1
    assert unseen <= 3


def change_tensor(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "pooled.weight")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0, 0] += 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def change_type(model: Any) -> None:
    """To one that there is not: numpy's converter looks it up."""
    model.graph.initializer[0].data_type = 33


def change_node(model: Any) -> None:
    gemm = next(found for found in model.graph.node if found.name == "last")
    next(attribute for attribute in gemm.attribute if attribute.name == "transB").i = 0


def change_words(model: Any) -> None:
    (entry,) = model.metadata_props
    entry.value = json.dumps({**json.loads(entry.value), "pattern": "1:4"})


def forget_words(model: Any) -> None:
    model.ClearField("metadata_props")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (change_tensor, "its tensors do not have the digest"),
        (change_type, "33"),
        (change_node, "its nodes do not have the digest"),
        (change_words, "what it says of itself does not have the digest"),
        (forget_words, "what it says of itself is missing"),
    ],
)
def test_refuses_files_of_ours_that_were_changed(change: Any, match: str, ours: Path, tmp_path: Path) -> None:
    model = onnx.load(ours)
    change(model)
    onnx.save(model, tmp_path / "m.onnx")
    for read in (graph_weights, about_graph):
        with pytest.raises(CheckpointError, match=rf"m\.onnx is damaged: {match}"):
            read(tmp_path / "m.onnx")


def test_says_what_it_was_told(ours: Path) -> None:
    said = about_graph(ours)
    assert said["row"] == "a row"
    assert said["weights"]["last"] == said["weights"]["tied"] == "last.weight"
    (entry,) = onnx.load(ours).metadata_props
    assert entry.key == "maskllm4v"
    assert entry.value == json.dumps(json.loads(entry.value), sort_keys=True)
