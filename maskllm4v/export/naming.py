"""Which of a graph's constants are whose weights, and names that say so: those of torch's exporter are its own."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from torch import nn

from maskllm4v import __version__
from maskllm4v.checkpoints.format import tensors_digest
from maskllm4v.export.graph import matrices
from maskllm4v.sparsity.parameters import Matrix
from maskllm4v.utils.errors import CheckpointError

PRODUCTS = ("MatMul", "Gemm")
SCOPES = "pkg.torch.onnx.name_scopes"


def name_after(model: Any, module: nn.Module, weights: dict[str, str]) -> dict[str, str]:
    """Name nodes and weights after layers; drop what says where the graph was exported, and by what.

    Args:
        model: a ``ModelProto``.
        module: that it is of.
        weights: names of initializers by masked matrix.

    Returns:
        Their new names.
    """
    graph, modules = model.graph, dict(module.named_modules())
    masked = {name: matrix for matrix, name in reversed(weights.items())}
    tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 or tensor.name in masked}
    nodes = {node.name for node in graph.node}
    values = {name for node in graph.node for name in (*node.input, *node.output)}
    names: dict[str, str] = {}
    for node in graph.node:
        scopes = [ast.literal_eval(entry.value) for entry in node.metadata_props if entry.key == SCOPES]
        multiplies = node.op_type in PRODUCTS or (node.op_type == "Conv" and node.input[1] in masked)
        read = [name for name in node.input if name in tables and multiplies]
        if read and scopes and len(scopes[0]) > 1:
            layer = scopes[0][-2].removeprefix("module.")
            if read[0] in masked and "weight" not in getattr(modules.get(layer), "_parameters", ()):
                layer = masked[read[0]]  # the module around it multiplies by it
            node.name = _free(layer, nodes)
            names.setdefault(read[0], _free(f"{layer}.weight" if layer in modules else layer, values))
    for tensor in graph.initializer:
        if (name := tensor.name).startswith("module."):
            names.setdefault(name, _free(name.removeprefix("module."), values))
        tensor.name = names.get(name, name)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
    _strip(model)
    model.producer_version = __version__
    return {matrix: names.get(name, name) for matrix, name in weights.items()}


def _free(name: str, taken: set[str]) -> str:
    """The name, numbered if it is taken; then it is."""
    found = next(n for n in (name, *(f"{name}.{i}" for i in range(1, len(taken) + 1))) if n not in taken)
    taken.add(found)
    return found


def _strip(message: Any) -> None:
    """Clear all doc strings and metadata, at any depth: stack traces hold paths."""
    for field in {"doc_string", "metadata_props"}.intersection(message.DESCRIPTOR.fields_by_name):
        message.ClearField(field)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def find_weights(model: Any, layers: Mapping[str, Matrix]) -> dict[str, str]:
    """Which initializer is each layer's weight: bit for bit, with its rows along the axis that is summed over.

    Experts may have one each; they are called ``layer.0`` and so on then.
    """
    names: dict[str, str] = {}
    for found in matrices(model.graph):
        names.setdefault(tensors_digest({"": found.weight}), found.name)
    weights: dict[str, str] = {}
    for layer, matrix in layers.items():
        whole = tensors_digest({"": matrix.rows.flatten(0, -2).contiguous()})
        if whole in names:
            weights[layer] = names[whole]
            continue
        if matrix.rows.dim() < 3:
            raise CheckpointError(f"layer {layer!r}: no node of the graph multiplies by its weight")
        for expert, rows in enumerate(matrix.rows):
            digest = tensors_digest({"": rows.contiguous()})
            if digest not in names:
                raise CheckpointError(
                    f"layer {layer!r}: no node of the graph multiplies by expert {expert}, or by the whole stack; "
                    "perhaps no token of the example comes there"
                )
            weights[f"{layer}.{expert}"] = names[digest]
    return weights
