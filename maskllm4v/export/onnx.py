"""Folded models as ONNX files for other runtimes, and the proof that these compute the same."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.export.graph import about_graph, describe, graph_weights, library, line, read_graph
from maskllm4v.export.naming import find_weights, name_after
from maskllm4v.export.tracing import make_constant_, traceable
from maskllm4v.sparsity.layers import Masked
from maskllm4v.sparsity.parameters import Matrix, find_matrix
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.tasks.base import ExportableModel
from maskllm4v.utils.errors import CheckpointError, ConfigError, UserError
from maskllm4v.utils.io import replacing

__all__ = ["about_graph", "export_onnx", "graph_weights"]

OPSET = 20  # read by all of TensorRT 10; the first with GELU as one operation
LIMIT = 2**31 - 2**24  # bytes of tensors; protobuf writes no message of 2 GiB
# Largest error, relative to the largest output. ViT-tiny, ViT-B/16 and DiT-S/2 had 0.7, 1.1 and 1.6e-6 in fp32; in fp16
# 1.4, 1.3 and 1.4e-3, as onnxruntime computes more of it in float32 than torch does, on CPUs.
BOUNDS = {"fp32": 1e-5, "fp16": 1e-2}


def export_onnx(
    path: Path,
    exportable: ExportableModel,
    *,
    half: bool = False,
    masks: Mapping[str, Tensor] = {},
    pattern: NMPattern | None = None,
    about: Mapping[str, Any] = {},
) -> None:
    """Write an ONNX file that takes any batch size, and check what was written before it gets its name.

    The same model gives the same bytes, wherever it is exported. Beyond protobuf's 2 GiB the tensors go into
    ``<name>.data`` next to the file. Linear layers' nodes and weights are named after the layers, and so are they in
    TensorRT's log. Pruned weights become positive zeros. The model itself is left as it is.

    Args:
        path: ``.onnx``.
        exportable: a folded model, on any device.
        half: weights and arithmetic in float16; inputs and outputs stay float32, and are cast inside.
        masks: boolean ``[out, in]`` by layer name, of the layers that have to be N:M sparse in the graph.
        pattern: theirs.
        about: what the file is to say of itself, see :func:`about_graph`.

    Raises:
        CheckpointError: a pruned weight is not zero, or a value is too large for float16; the graph lacks a masked
            weight, bit for bit; or onnxruntime finds other outputs than torch, see :data:`BOUNDS`.
        PatternError: a mask does not fit its pattern.
        ConfigError: there is no such layer, the model cannot be exported, or onnx is not installed.
    """
    precision = "fp16" if half else "fp32"
    for name in ("onnx", "onnxscript", "onnxruntime"):
        library(name)
    with torch.no_grad():
        runtime = _Runtime(replace(exportable, module=copy.deepcopy(exportable.module)), half).eval()
        make_constant_(runtime.module)
        layers = _layers(runtime.module, masks)
        for layer, matrix in layers.items():
            _settle(matrix, masks[layer].cpu(), pattern, layer)
        runtime = runtime.to(torch.float16 if half else torch.float32)
        for name, tensor in runtime.module.state_dict().items():
            if half and bool(tensor.isinf().any()):
                raise CheckpointError(f"{name!r} holds values that are too large for float16")
        model = _export(runtime, exportable)
    weights = name_after(model, runtime.module, find_weights(model, layers))
    describe(model, {**about, "pattern": pattern and str(pattern), "precision": precision, "weights": weights})
    with _staged(path) as staged:
        _save(staged, model)
        del model  # it may fill gigabytes
        read_graph(staged)
        _check_outputs(staged, runtime, exportable, BOUNDS[precision])


class _Runtime(nn.Module):
    """A module on the CPU whose floating-point inputs and outputs are float32, whatever it computes in."""

    def __init__(self, exportable: ExportableModel, half: bool) -> None:
        super().__init__()
        self.module, self.named, self.half_inside = exportable.module, exportable.named, half
        self.cpu()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        cast = [x.half() if self.half_inside and x.is_floating_point() else x for x in inputs]
        return tuple(output.float() for output in self.named(self.module(*cast)).values())


def _layers(module: nn.Module, names: Iterable[str]) -> dict[str, Matrix]:
    """The layers by their names in the model, which a task may have put into a wrapper: the outermost that has all."""
    missing = ""
    for inner in module.modules():
        layers = {}
        for name in names:
            with suppress(ConfigError):
                layers[name] = find_matrix(inner, name)
        absent = [name for name in names if name not in layers]
        if not absent:
            return layers
        missing = missing or absent[0]
    raise ConfigError(f"the model has no linear layer {missing!r}")


def _settle(matrix: Matrix, mask: Tensor, pattern: NMPattern | None, layer: str) -> None:
    """Check that a layer is folded; make its zeros positive, as runtimes may look for them by their bits."""
    if pattern is None:
        raise ConfigError("masks without a pattern")
    if isinstance(matrix.module, Masked):
        raise ConfigError(f"layer {layer!r} is a {type(matrix.module).__name__}, not a plain one; fold the model first")
    rows = matrix.rows
    if mask.shape != rows.shape:
        raise CheckpointError(f"layer {layer!r}: mask {tuple(mask.shape)} for a weight {tuple(rows.shape)}")
    pattern.validate(mask, layer)
    if bool((rows[~mask.bool()] != 0).any()):
        raise CheckpointError(f"layer {layer!r}: the weight is not zero where its mask is; fold the model first")
    matrix.write_(rows.masked_fill(~mask.bool(), 0.0))


def _export(runtime: _Runtime, exportable: ExportableModel) -> Any:
    """The exporter's ``ModelProto``."""
    names, batch = list(exportable.inputs), torch.export.Dim("batch")
    try:
        with traceable(runtime.module), warnings.catch_warnings():  # of the axis that all inputs share on purpose
            warnings.filterwarnings("ignore", "# The axis name: batch will not be used")
            program = torch.onnx.export(
                runtime,
                tuple(_rows(exportable, _traced(exportable)).values()),
                input_names=names,
                output_names=list(exportable.outputs),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=(tuple({0: batch} for _ in names),),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"torch.onnx cannot export the model: {line(error.__cause__ or error)}") from error
    assert program is not None
    return program.model_proto


def _traced(exportable: ExportableModel) -> int:
    """The batch size to trace with; what torch finds out about a batch of one holds for no other."""
    return max(2, len(next(iter(exportable.inputs.values()))))


def _rows(exportable: ExportableModel, count: int) -> dict[str, Tensor]:
    """So many samples of the example, from its last to its first, and so on."""
    return {name: x[-1 - torch.arange(count) % len(x)] for name, x in exportable.inputs.items()}


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Give a name in a temporary folder; what is there moves to the folder of ``path`` if all went well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder) / path.name
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the data before the graph that needs it
                with replacing(path.with_name(file.name)) as temporary:
                    file.replace(temporary)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _save(path: Path, model: Any) -> None:
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LIMIT
    onnx = library("onnx")
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data", size_threshold=1024)
    onnx.checker.check_model(path, full_check=True)


def _check_outputs(path: Path, runtime: _Runtime, exportable: ExportableModel, bound: float) -> None:
    """Compare onnxruntime to torch, on the CPU, at two batch sizes that were not traced."""
    onnxruntime = library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    batches = [_rows(exportable, size) for size in (1, _traced(exportable) + 1)]
    arrays = [{name: x.numpy() for name, x in batch.items()} for batch in batches]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = [session.run(list(exportable.outputs), inputs) for inputs in arrays]
    except Exception as error:  # onnxruntime's have no family of their own
        raise CheckpointError(f"onnxruntime does not run the graph: {line(error)}") from error
    for batch, found in zip(batches, outputs, strict=True):
        with torch.no_grad():
            wanted = runtime(*batch.values())
        for name, one, other in zip(exportable.outputs, map(torch.from_numpy, found), wanted, strict=True):
            same = one.shape == other.shape
            off = float((one - other).abs().max() / (other.abs().max() or 1)) if same else math.inf
            if not off <= bound:
                raise CheckpointError(
                    f"for {len(other)} samples onnxruntime's outputs are off by {off:.1e} of the largest of torch's "
                    f"in {name!r}; rounding explains {bound:.0e}"
                )
