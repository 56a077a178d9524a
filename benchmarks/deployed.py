"""A folded 2:4 model as one deploys it: what runs it, in which way, how much memory it takes; and what failed."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import maskllm4v
from benchmarks.measure import Timing, interleaved, synchronize
from benchmarks.results import Row
from maskllm4v.export.semi_structured import Conversion, to_semi_structured_
from maskllm4v.export.sparse_speed import captured
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import prunable_linears

HEAD = "head"  # stays dense
PATTERN = NMPattern(2, 4)
DENSE, ZEROS, TORCH, OURS, FASTER = "dense", "2:4 zeros", "torch", "ours", "ours, faster only"
RUNTIME = "onnxruntime"
Call = Callable[[], Any]
Cell = Mapping[str, str | int]  # which number is meant: model, batch, ...


@dataclass
class Log:
    """Cells that could not be measured, with the reason, and how much time is left.

    Attributes:
        seconds: that all may take.
        rows: what failed.
    """

    seconds: float
    rows: list[Row] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def attempt(self, cell: Cell, **more: str | int) -> Attempt:
        """Whatever fails inside is noted, and nothing else is stopped by it."""
        return Attempt(self, {**cell, **more})

    def allows(self, needed: float, cell: Cell) -> bool:
        """Whether so many seconds are left; noted if not."""
        if time.monotonic() - self.begin + needed <= self.seconds:
            return True
        self.note(cell, "no time left")
        return False

    def note(self, cell: Cell, reason: str) -> None:
        self.rows.append({**cell, "reason": reason})
        print(f"not measured: {self.rows[-1]}", flush=True)


@dataclass
class Attempt:
    """The context of :meth:`Log.attempt`."""

    log: Log
    cell: Cell

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.log.note(self.cell, f"{type(error).__name__}: {error}".strip().splitlines()[0][:200])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        name: timm's.
        dense: random weights.
        zeros: the same ones under magnitude masks, folded.
        masks: boolean ``[out, in]`` by layer name.
        size: pixels of an image's side.
    """

    name: str
    dense: nn.Module
    zeros: nn.Module
    masks: dict[str, Tensor]
    size: int

    def images(self, batch: int) -> Tensor:
        """Normal noise ``[batch, 3, size, size]`` of the model's type, where it is."""
        weight = next(self.dense.parameters())
        return torch.randn(batch, 3, self.size, self.size, device=weight.device).to(weight.dtype)

    def layers(self) -> dict[str, str]:
        """The first layer of each shape, such as ``blocks.0.attn.qkv``, by ``attn.qkv 2304x768``."""
        found: dict[str, str] = {}
        shapes = set[tuple[int, ...]]()
        for name, layer in prunable_linears(self.dense, exclude=[HEAD]).items():
            if (shape := tuple(layer.weight.shape)) not in shapes:
                shapes.add(shape)
                found[kind(name, shape)] = name
        return found


def kind(layer: str, shape: tuple[int, ...]) -> str:
    """``attn.qkv 2304x768`` for a layer ``blocks.0.attn.qkv``."""
    return f"{'.'.join(layer.split('.')[-2:])} {'x'.join(map(str, shape))}"


def build(name: str, device: torch.device, dtype: torch.dtype, *, quick: bool) -> Model:
    """A model and its folded twin in evaluation mode. ``quick``: one narrow block, 10 classes."""
    tiny = {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10} if quick else {}
    torch.manual_seed(0)
    dense = timm.create_model(name, **tiny).to(device, dtype).eval()
    zeros = copy.deepcopy(dense)
    masks = maskllm4v.prune(zeros, "magnitude", pattern=PATTERN, exclude=[HEAD])
    return Model(name, dense, maskllm4v.fold_(zeros), masks, 32 if quick else 224)


def by_torch(model: nn.Module) -> nn.Module:
    """The copy of a folded model whose weights went through ``to_sparse_semi_structured``, and nothing else."""
    model = copy.deepcopy(model)
    for layer in prunable_linears(model, exclude=[HEAD]).values():
        sparse: Any = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def by_us(model: nn.Module, images: Tensor, *, faster_only: bool) -> tuple[nn.Module, list[Conversion]]:
    """The copy of a folded model converted for such images, and what was converted."""
    model = copy.deepcopy(model)
    found = to_semi_structured_(model, exclude=[HEAD], example=lambda m: m(images), faster_only=faster_only)
    return model, found


def candidates(
    model: Model, images: Tensor, log: Log, cell: Cell, *, cuda: bool
) -> tuple[dict[str, nn.Module], list[Row]]:
    """All candidates by name, dense first, and a row a kind of layer on what was converted."""
    found, rows = {DENSE: model.dense}, list[Row]()
    if not cuda:
        return {**found, ZEROS: model.zeros}, rows
    with log.attempt(cell, candidate=TORCH):
        found[TORCH] = by_torch(model.zeros)
    for name in (OURS, FASTER):
        with log.attempt(cell, candidate=name):
            found[name], lines = by_us(model.zeros, images, faster_only=name == FASTER)
            rows += [{**cell, "candidate": name, **row} for row in conversion_rows(lines)]
    return found, rows


def conversion_rows(lines: list[Conversion]) -> list[Row]:
    """A row for all layers of the same name and shape in their blocks."""
    groups: dict[str, list[Conversion]] = {}
    for line in lines:
        groups.setdefault(kind(line.layer, line.shape), []).append(line)
    rows = list[Row]()
    for name, group in groups.items():
        row: Row = {"layers": name, "count": len(group), "converted": sum(line.converted for line in group)}
        first = group[0]
        if first.dense_ms is not None and first.sparse_ms is not None:
            row |= {"algorithm": first.algorithm, "dense_ms": first.dense_ms, "sparse_ms": first.sparse_ms}
        reasons = dict.fromkeys(line.reason for line in group if line.reason)
        rows.append({**row, "reason": next(iter(reasons), "")})
    return rows


def graphed(call: Call, times: int = 1) -> Call:
    """Replays a CUDA graph of so many calls."""
    return captured(call, times).replay


def sessions(model: Model, log: Log) -> dict[str, Any]:
    """onnxruntime's on the CPU, for any batch, with the dense and the folded weights; by candidate."""
    found: dict[str, Any] = {}
    cell = {"model": model.name, "mode": RUNTIME}
    for name, module, masks in ((DENSE, model.dense, {}), (ZEROS, model.zeros, model.masks)):
        with log.attempt(cell, candidate=name), tempfile.TemporaryDirectory() as folder:
            export, tasks = import_module("maskllm4v.export.onnx"), import_module("maskllm4v.tasks.base")
            runtime, path = import_module("onnxruntime"), Path(folder) / "model.onnx"
            exportable = tasks.ExportableModel(module, {"images": model.images(2)}, ("logits",))
            export.export_onnx(path, exportable, masks=masks, pattern=PATTERN if masks else None)
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            found[name] = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return found


def timed(
    calls: Mapping[str, Call], log: Log, cell: Cell, *, repeats: int, inside: int = 1
) -> dict[str, tuple[Timing, Timing]]:
    """Time calls in turn, those that work.

    Args:
        calls: by candidate.
        log: for those that fail.
        cell: what is timed.
        repeats: that count.
        inside: how often a call does its work.

    Returns:
        Seconds a piece of work, and the dense one's seconds, by candidate; nothing where the dense one fails.
    """
    working: dict[str, Call] = {}
    for name, call in calls.items():
        with log.attempt(cell, candidate=name):
            for _ in range(2):
                call()
            synchronize()
            working[name] = call
    if DENSE not in working:
        return {}
    with log.attempt(cell):
        found = interleaved(working, repeats=repeats)
        each = {name: Timing.of(sample / inside for sample in time.samples) for name, time in found.items()}
        return {name: (time, each[DENSE]) for name, time in each.items()}
    return {}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once; of semi-structured ones what they are packed into."""
    total = 0
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        packed = [getattr(tensor, name, None) for name in ("packed", "meta", "packed_t", "meta_t")]
        inner = [part for part in packed if isinstance(part, Tensor)] or [tensor]
        total += sum(part.numel() * part.element_size() for part in inner)
    return total


def file_sizes(model: Model, log: Log) -> list[Row]:
    """Bytes on disk of each format and type, and the share of the dense model's file of the same type."""
    rows = list[Row]()
    with log.attempt({"model": model.name}, section="size"), tempfile.TemporaryDirectory() as folder:
        files = import_module("maskllm4v.export.files")
        path = Path(folder) / "file.safetensors"
        common = (model.name, "magnitude", "0" * 64)
        dense = files.Folded(model.dense, {}, None, model.name, "dense", "0" * 64)
        folded = files.Folded(model.zeros, model.masks, PATTERN, *common)

        def size(write: Callable[..., Any], *given: Any) -> int:
            write(path, *given)
            return path.stat().st_size

        for dtype in ("fp32", "fp16", "bf16"):
            whole = size(files.write_folded, dense, dtype)
            for name, length in (("dense", whole), ("packed", size(files.write_packed, folded, dtype))):
                rows.append(
                    {"model": model.name, "format": name, "dtype": dtype, "bytes": length, "ratio": length / whole}
                )
        rows.append({"model": model.name, "format": "mask", "bytes": size(files.write_masks, folded)})
    return rows
