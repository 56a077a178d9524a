"""Rows and checkpoints as files of every format, each read back and compared before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from maskllm4v.checkpoints.apply import install
from maskllm4v.checkpoints.format import load_verified
from maskllm4v.checkpoints.masks import load_dense, load_masks
from maskllm4v.checkpoints.packed import load_packed_file
from maskllm4v.config import Experiment
from maskllm4v.export.files import Folded, write_folded, write_masks, write_packed
from maskllm4v.export.onnx import export_onnx
from maskllm4v.runs.makers import check_inputs
from maskllm4v.runs.paths import checkpoint, record_file
from maskllm4v.runs.records import measurement_digest, read_record
from maskllm4v.sparsity.surgery import fold_
from maskllm4v.tasks.base import Task
from maskllm4v.utils.errors import CheckpointError, ConfigError
from maskllm4v.utils.io import file_digest, replacing

BATCH = 2  # of the example that ONNX graphs are traced with; they take any


def folded_row(experiment: Experiment, task: Task, row: str, seed: int | None = None) -> Folded:
    """A row's model under the masks of a seed, by default its first one.

    Raises:
        CheckpointError: a file is missing, damaged, or belongs to another model or pattern.
        ConfigError: there is no such row or seed.
    """
    seeds = experiment.row(row).seeds
    if seed is not None and seed not in seeds:
        raise ConfigError(f"row {row!r} has no seed {seed}; allowed: {', '.join(map(str, seeds))}")
    seed = seeds[0] if seed is None else seed
    model, name = task.build_model(seed), experiment.model.name
    model.cpu()
    base = load_dense(checkpoint(experiment.dense.row, experiment.dense_seed(seed)), model, name)
    record = record_file(experiment.table, row)
    manifest, measured = task.data_digest, measurement_digest(read_record(record)) if record.exists() else None
    args = experiment.model.args
    if experiment.row(row).kind == "dense":
        check_inputs(experiment, seed, base)
        return Folded(model, {}, None, name, "dense", base, manifest=manifest, record=measured, args=args)
    path = checkpoint(row, seed)
    found = load_masks(path, pattern=experiment.row(row).pattern, base=base)
    check_inputs(experiment, seed, base, row, found.digest)
    model, updated = fold_(install(model, found, str(path))), bool(found.weights)
    about = (name, found.method, base, updated, manifest, measured, args)
    return Folded(model, found.masks, found.pattern, *about, found.permutations)


def write(path: Path, format: str, folded: Folded, dtype: str | None, task: Task) -> None:
    """Write one file.

    Args:
        path: the file; ``.safetensors``, or ``.onnx``.
        format: ``"packed"``, ``"mask"``, ``"dense"`` or ``"onnx"``.
        folded: what to write.
        dtype: ``"fp32"``, ``"fp16"``, ``"bf16"``; None: as the model's. ONNX is written in the first two.
        task: whose example inputs ONNX graphs are traced with.

    Raises:
        CheckpointError: the model cannot be written so, or what was written is not what was meant.
        PatternError: a weight is not zero where its mask is.
    """
    if format == "onnx" and dtype == "bf16":
        raise CheckpointError("ONNX is written in fp32 and fp16, not in bf16")
    if format == "onnx":
        export_onnx(
            path,
            task.exportable(folded.model, BATCH),
            half=dtype == "fp16",
            masks=folded.masks,
            pattern=folded.pattern,
            about=folded.about("onnx"),
        )
        return
    with replacing(path) as temporary:
        if format == "packed":
            write_packed(temporary, folded, dtype)
            _compare(load_packed_file(temporary).tensors, folded.state(dtype), path)
        elif format == "dense":
            write_folded(temporary, folded, dtype)
            _compare(load_verified(temporary, "dense")[0], folded.state(dtype), path)
        else:
            write_masks(temporary, folded)
            _compare(load_masks(temporary).masks, folded.masks, path)


def file_name(row: str, format: str, dtype: str | None) -> str:
    """``digits-wanda-packed-fp16.safetensors``."""
    parts = [row, *([] if format == "onnx" else [format]), *([dtype] if dtype else [])]
    return f"{'-'.join(parts)}.{'onnx' if format == 'onnx' else 'safetensors'}"


def write_row(experiment: Experiment, task: Task, row: str, folder: Path) -> dict[str, Any]:
    """Write all files of a row into an empty folder; returns what is committed of them."""
    folded = folded_row(experiment, task, row)
    listed = []
    for format, dtype in experiment.exports[row].files():
        path = folder / file_name(row, format, dtype)
        write(path, format, folded, dtype, task)
        facts = {"file": path.name, "format": format, "dtype": dtype}
        listed.append({**facts, "bytes": path.stat().st_size, "sha256": file_digest(path)})
    return {
        "row": row,
        "seed": experiment.row(row).seeds[0],
        "model": folded.name,
        "pattern": None if folded.pattern is None else str(folded.pattern),
        "layers": len(folded.masks),
        "record": folded.record,
        "files": listed,
    }


def _compare(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in wanted.items():
        other = found.get(name)
        if other is None or other.dtype != tensor.dtype or not _same_values(other, tensor.cpu()):
            raise CheckpointError(f"{path}: {name!r} does not come back as it was written")


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Equal, and not-a-number where the other is."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
