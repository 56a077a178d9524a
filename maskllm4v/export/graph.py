"""What is in an ONNX file: its constant matrices, and what a file of ours says of itself.

torch's exporter writes a linear layer as ``MatMul(x, W)`` with the transposed weight ``[in, out]``, or as
``Gemm(x, W, bias)`` with ``transB`` and the weight as it is where the inputs have two dimensions. N:M groups lie along
the axis that is summed over, whichever that is. Of a matrix whose outputs are parted, as attention's three in one are,
nodes multiply by some rows each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.checkpoints.format import METADATA_KEY, tensors_digest
from maskllm4v.utils.errors import CheckpointError, ConfigError
from maskllm4v.utils.io import value_digest

PRODUCER = "maskllm4v"
FORMAT = 1


@dataclass(frozen=True)
class GraphWeight:
    """A constant matrix of a graph, as one node multiplies by it.

    Attributes:
        name: of the initializer, or of the value that a ``Constant`` gives.
        node: the node's name.
        op: ``"MatMul"``, ``"Gemm"`` or ``"Conv"``.
        array: as it is stored, ``[K, N]`` or ``[N, K]``, whole; stacks side by side; of a convolution as
            :func:`maskllm4v.sparsity.layout.to_rows` has it.
        k_axis: the axis of ``array`` that is summed over, 0 or 1: N:M groups lie along it.
        layer: the masked layer whose weight this is, as a file of ours says; None for all others.
        plain: whether it is stored as a matrix, and not as a stack of them or a convolution's weight.
    """

    name: str
    node: str
    op: str
    array: np.ndarray
    k_axis: int
    layer: str | None = None
    plain: bool = True

    @property
    def weight(self) -> Tensor:
        """``[N, K]``, as ``nn.Linear`` holds it, so that groups lie in rows; types that NumPy lacks as float32."""
        array = self.array if self.array.dtype.isbuiltin == 1 else self.array.astype(np.float32)
        return torch.from_numpy(np.array(array if self.k_axis == 1 else array.T, order="C"))


def graph_weights(path: Path) -> list[GraphWeight]:
    """All constant matrices that a ``MatMul`` or ``Gemm`` multiplies by, in the order of the nodes.

    A matrix that several nodes share is listed once for each. It may reach a node through ``Transpose``, ``Identity``,
    ``Cast`` and ``Split``; subgraphs and functions are looked through too. Of stacks and
    convolutions those are listed that a file of ours says are masked.

    Raises:
        CheckpointError: missing, damaged, no ONNX file, or ours and changed since it was written.
        ConfigError: onnx is not installed.
    """
    model, about = read_graph(path)
    layers = {name: layer for layer, name in reversed(about.get("weights", {}).items())}
    try:
        found = [replace(weight, layer=layers.get(weight.name)) for weight in matrices(model.graph)]
        return [weight for weight in found if weight.plain or weight.layer is not None]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {line(error)}") from error


def about_graph(path: Path) -> dict[str, Any]:
    """What a file of ours says of itself; empty for any other ONNX file. Errors as above.

    On top of what :func:`maskllm4v.export.onnx.export_onnx` was given: ``pattern`` (or None), ``precision`` (``"fp32"``
    or ``"fp16"``), and ``weights``: the initializer's name by masked layer.
    """
    return read_graph(path)[1]


def read_graph(path: Path) -> tuple[Any, dict[str, Any]]:
    """A file's ``ModelProto``, and :func:`about_graph`. Errors as above."""
    onnx = library("onnx")
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    try:
        onnx.checker.check_model(path)
        model = onnx.load(path)
        if model.functions:
            model = library("onnx.inliner").inline_local_functions(model)
    except Exception as error:  # protobuf, onnx's C++ and the file system have no family of errors in common
        raise CheckpointError(f"{path} is damaged or no ONNX file: {line(error)}") from error
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    if not texts and model.producer_name != PRODUCER:
        return model, {}
    try:
        about = json.loads(texts[0])
        seal = about.pop("seal")
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: what it says of itself is missing") from error
    if value_digest(about) != seal:
        raise CheckpointError(f"{path} is damaged: what it says of itself does not have the digest it was written with")
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path} is an ONNX file in format {about.get('format')} of ours, not {FORMAT}")
    try:
        found = _digests(model)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {line(error)}") from error
    for part, digest in found.items():
        if about[part] != digest:
            raise CheckpointError(f"{path} is damaged: its {part} do not have the digest they were written with")
    return model, about


def describe(model: Any, about: Mapping[str, Any]) -> None:
    """Make a ``ModelProto`` one of ours: what it says of itself, digests of all that it holds, and a seal over both."""
    model.producer_name = PRODUCER
    about = {**about, "format": FORMAT, **_digests(model)}
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps({**about, "seal": value_digest(about)}, sort_keys=True)


def _digests(model: Any) -> dict[str, str]:
    to_array = import_module("onnx.numpy_helper").to_array
    tensors = {tensor.name: torch.from_numpy(np.array(to_array(tensor))) for tensor in model.graph.initializer}
    rest = type(model)(ir_version=model.ir_version, opset_import=model.opset_import)
    for field in ("node", "input", "output", "value_info"):
        getattr(rest.graph, field).extend(getattr(model.graph, field))
    return {
        "tensors": tensors_digest(tensors),
        "nodes": hashlib.sha256(rest.SerializeToString(deterministic=True)).hexdigest(),
    }


@dataclass(frozen=True)
class _Constant:
    """A value of a graph that is made of one constant.

    Attributes:
        name: of the initializer, or of the value that a ``Constant`` gives.
        tensor: its ``TensorProto``.
        turned: whether the last two axes have changed places.
        cut: the axis, as it is stored, of which the value is a part.
    """

    name: str
    tensor: Any
    turned: bool = False
    cut: int | None = None


def matrices(graph: Any, outer: Mapping[str, _Constant] = {}) -> Iterator[GraphWeight]:
    """See :func:`graph_weights`; all stacks, and convolutions that multiply each patch once, are listed.

    Args:
        graph: a ``GraphProto``.
        outer: the values around it that are constant.
    """
    known = {**outer, **{tensor.name: _Constant(tensor.name, tensor) for tensor in graph.initializer}}
    for node in graph.node:
        given = {attribute.name: attribute for attribute in node.attribute}
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from matrices(inner, known)
        first = known.get(node.input[0]) if node.input else None
        if node.op_type == "Constant" and "value" in given:
            known[node.output[0]] = _Constant(node.output[0], given["value"].t)
        elif node.op_type in ("Transpose", "Identity", "Cast") and first is not None:
            turns = node.op_type == "Transpose" and _turns_rows(given, len(first.tensor.dims))
            known[node.output[0]] = replace(first, turned=first.turned != turns)
        elif node.op_type == "Split" and first is not None and first.cut is None and len(first.tensor.dims) == 2:
            axis = (given["axis"].i if "axis" in given else 0) % 2
            known |= dict.fromkeys(node.output, replace(first, cut=1 - axis if first.turned else axis))
        elif node.op_type in ("MatMul", "Gemm"):
            for place, flag in enumerate(("transA", "transB")):
                constant = known.get(node.input[place])
                if constant is not None and len(constant.tensor.dims) in (2, 3):
                    turned = constant.turned != (flag in given and bool(given[flag].i))
                    k_axis = place if turned else 1 - place
                    if constant.cut != k_axis:
                        array = _side_by_side(_array(constant), k_axis)
                        plain = len(constant.tensor.dims) == 2
                        yield GraphWeight(constant.name, node.name, node.op_type, array, k_axis, plain=plain)
        elif node.op_type == "Conv" and (constant := known.get(node.input[1])) is not None:
            kernel = list(constant.tensor.dims)[2:]
            if _multiplies_patches(given, kernel):
                rows = np.moveaxis(_array(constant), 1, -1).reshape(constant.tensor.dims[0], -1)
                yield GraphWeight(constant.name, node.name, "Conv", rows, 1, plain=False)


def _array(constant: _Constant) -> np.ndarray:
    array: np.ndarray = import_module("onnx.numpy_helper").to_array(constant.tensor)
    return array


def _turns_rows(given: Mapping[str, Any], dims: int) -> bool:
    """Whether a ``Transpose`` makes rows columns and leaves all else; without an order it turns all axes round."""
    order = list(given["perm"].ints) if "perm" in given else list(range(dims))[::-1]
    return order == [*range(dims - 2), dims - 1, dims - 2]


def _side_by_side(array: np.ndarray, k_axis: int) -> np.ndarray:
    """A stack ``[experts, ...]`` as one matrix with more outputs; matrices as they are."""
    if array.ndim == 2:
        return array
    return np.concatenate(list(array), axis=1 - k_axis)


def _multiplies_patches(given: Mapping[str, Any], kernel: list[int]) -> bool:
    """As :func:`maskllm4v.sparsity.parameters.multiplies_patches`, of a ``Conv``."""
    numbers = {name: list(given[name].ints) for name in ("strides", "pads", "dilations") if name in given}
    strides, single = numbers.get("strides", [1] * len(kernel)), set(kernel) == {1}
    parted = single or (strides == kernel and set(numbers.get("dilations", [1])) == {1})
    groups = given["group"].i if "group" in given else 1
    return parted and not any(numbers.get("pads", ())) and groups == 1


def library(name: str) -> Any:
    """Raises :class:`ConfigError` where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"ONNX files need {name}: pip install -e '.[export]' ({error})") from error


def line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300]
