"""Write a sparse model for others: packed weights, masks alone, a state dict with zeros, an ONNX graph.

Either a row of the pipeline, or a checkpoint of a timm model: masks of prune, train or update, packed ones, the
original's files, or any state dict whose pruned weights are zero.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from maskllm4v.cli import options
from maskllm4v.config import PARAMS, RuntimeSettings, TaskSpec, load_experiment
from maskllm4v.runs.paths import data_folder
from maskllm4v.utils.errors import CheckpointError, ConfigError, PatternError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from maskllm4v.export.files import Folded
    from maskllm4v.sparsity.patterns import NMPattern
    from maskllm4v.tasks.base import Task

FORMATS = {
    "packed": "kept values and their places; maskllm4v.load_packed reads it",
    "mask": "masks alone, 3 bits a group of 2:4",
    "dense": "a state dict with zeros, which timm reads",
    "onnx": "a graph for other runtimes",
}
OF_ROWS = ("params", "seed_of_row")
OF_FILES = (
    "model",
    "pattern",
    "exclude",
    "convolutions",
    "use_ema",
    "pretrained",
    "dense_checkpoint",
    "num_classes",
    "img_size",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("row", nargs="?", metavar="ROW", help="of the experiment")
    parser.add_argument("--format", choices=tuple(FORMATS), default="packed", help=f"{formats} (default packed)")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="of floating-point tensors (default: as they are)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: here, e.g. digits-wanda-packed-fp16.safetensors"
    )
    parser.add_argument("--params", type=Path, metavar="FILE", help=f"the experiment (default {PARAMS})")
    parser.add_argument("--seed-of-row", type=int, metavar="N", help="whose masks to take (default: the first)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a file instead of a row; needs --model")
    parser.add_argument(
        "--use-ema", action=argparse.BooleanOptionalAction, help="of timm's files take the average, if there is one"
    )
    options.add_exclude(parser, "of files without masks: ")
    options.add_convolutions(parser, "of files without masks: ")
    options.add_pattern(parser, "what the file says; else 2:4")
    options.add_model(parser, required=False, images=False)
    parser.set_defaults(exclude=None, workers=0, device="cpu")


def run(arguments: argparse.Namespace) -> None:
    from maskllm4v.export.writing import file_name, folded_row, write
    from maskllm4v.tasks.base import open_task

    a = arguments
    _check_flags(a)
    dtype = a.dtype
    if a.row is not None:
        experiment = load_experiment(a.params or PARAMS)
        spec = replace(experiment.task_spec(), runtime=RuntimeSettings(device="cpu"))
        task = open_task(spec, data_folder(experiment.data.name))
        folded, name = folded_row(experiment, task, a.row, a.seed_of_row), a.row
    else:
        excluded = {"exclude": a.exclude} if a.exclude is not None else {}
        spec = options.settings(options.Flags, a, model={**excluded, "convolutions": a.convolutions}).spec
        task = open_task(spec)
        folded, own = _folded_file(a, spec, task)
        name = re.sub(r"(\.(safetensors|pth|pt|bin|tar))+$", "", a.checkpoint.name)
        dtype = dtype or own
    path = a.output or Path(file_name(name, a.format, a.dtype))
    write(path, a.format, folded, dtype, task)
    size, layers = path.stat().st_size, len(folded.masks)
    print(f"{path}: {size:,} bytes, {layers} layers {folded.pattern}" if layers else f"{path}: {size:,} bytes, dense")


def _check_flags(a: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for flags that would do nothing."""
    if (a.row is None) == (a.checkpoint is None):
        raise ConfigError("say either a row of the experiment or --checkpoint FILE")
    foreign, where = (OF_ROWS, "rows") if a.row is None else (OF_FILES, "--checkpoint")
    if given := [key for key in foreign if getattr(a, key) not in (None, False)]:
        raise ConfigError(f"--{given[0].replace('_', '-')} is for {where}")
    if a.row is None and a.model is None:
        raise ConfigError("--checkpoint needs --model, timm's name of the architecture")
    if a.format == "mask" and a.dtype is not None:
        raise ConfigError("--dtype is not for masks, which have none")
    suffix = ".onnx" if a.format == "onnx" else ".safetensors"
    if a.output is not None and a.output.suffix != suffix:
        raise ConfigError(f"--output: {a.output} does not end in {suffix}, as {a.format!r} files do")


def _folded_file(a: argparse.Namespace, spec: TaskSpec, task: Task) -> tuple[Folded, str | None]:
    """The model of a checkpoint, and the type of its weights, if they have one."""
    from maskllm4v.checkpoints.format import tensors_digest
    from maskllm4v.checkpoints.third_party import LoadedWeights, load_any
    from maskllm4v.cli import inputs
    from maskllm4v.export.files import Folded
    from maskllm4v.sparsity.patterns import NMPattern
    from maskllm4v.sparsity.surgery import fold_
    from maskllm4v.sparsity.survey import prunable_matrices

    found = load_any(a.checkpoint, ema=a.use_ema, pattern=a.pattern)
    said = found.about if isinstance(found, LoadedWeights) else {}
    model, masks = inputs.masked_model(a, spec, task, found, a.checkpoint)
    name, args = spec.model.name, spec.model.args
    if isinstance(found, LoadedWeights) and masks is None:
        pattern = NMPattern(a.pattern or said.get("pattern") or "2:4")
        chosen = spec.model
        layers = said.get("layers") or prunable_matrices(
            model, pattern, exclude=chosen.excluded_layers, convolutions=chosen.convolutions
        )
        zeros = _masks_of_zeros(model, pattern, layers, a.checkpoint)
        base = said.get("base") or tensors_digest(model.state_dict())
        folded = Folded(model, zeros, pattern, name, said.get("method", "unknown"), base, updated=True)
    else:
        assert masks is not None
        updated = found.zeroed if isinstance(found, LoadedWeights) else bool(masks.weights)
        base, method = said.get("base") or masks.base, said.get("method") or masks.method
        about = (name, method, base, updated)
        folded = Folded(fold_(model), masks.masks, masks.pattern, *about, permutations=masks.permutations)
    return replace(folded, manifest=said.get("manifest"), record=said.get("record"), args=args), _dtype(found)


def _masks_of_zeros(model: nn.Module, pattern: NMPattern, layers: Iterable[str], path: Path) -> dict[str, Tensor]:
    """The masks that a model's zeros amount to.

    Raises:
        CheckpointError: a layer breaks the pattern.
    """
    from maskllm4v.checkpoints.packed import mask_of
    from maskllm4v.sparsity.parameters import find_matrix

    try:
        return {name: mask_of(find_matrix(model, name).rows.detach(), pattern, name) for name in layers}
    except PatternError as error:
        hint = "if it is pruned, say its --pattern, and --exclude what is dense"
        raise CheckpointError(f"{path}: {error}; {hint}") from error


def _dtype(found: object) -> str | None:
    """The one type of a file's floating-point weights; None if there are several, or it holds masks."""
    from maskllm4v.checkpoints.third_party import LoadedWeights
    from maskllm4v.export.files import DTYPES

    if not isinstance(found, LoadedWeights):
        return None
    types = {tensor.dtype for tensor in found.weights.values() if tensor.is_floating_point()}
    return next((name for name, type in DTYPES.items() if types == {type}), None)
