"""Write a sparse model for others: packed weights, masks alone, a state dict with zeros, an ONNX graph.

Either a row of the pipeline, or a checkpoint: masks of prune or train, packed ones, the original's files, or any state
dict whose pruned weights are zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskllm4v.cli import options
from maskllm4v.config import PARAMS, load_experiment
from maskllm4v.errors import ConfigError
from maskllm4v.layout import data_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from maskllm4v.config import Experiment
    from maskllm4v.export.files import Folded
    from maskllm4v.patterns import NMPattern
    from maskllm4v.tasks import Task

FORMATS = {
    "packed": "kept values and 2-bit positions; maskllm4v.load_packed reads it",
    "mask": "masks alone, 3 bits a group of 2:4",
    "dense": "a state dict with zeros, which timm reads",
    "onnx": "a graph for other runtimes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("row", nargs="?", metavar="ROW", help="of the experiment")
    parser.add_argument("--format", choices=tuple(FORMATS), default="packed", help=f"{formats} (default packed)")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="of floating-point tensors (default: as they are)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default <row or checkpoint>-<format>...")
    parser.add_argument(
        "--params", type=Path, default=PARAMS, metavar="FILE", help=f"the experiment (default {PARAMS})"
    )
    parser.add_argument("--seed-of-row", type=int, metavar="N", help="whose masks to take (default: the first)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a file instead of a row; needs --model")
    parser.add_argument(
        "--use-ema", action=argparse.BooleanOptionalAction, help="of timm's files take the average, if there is one"
    )
    options.add_exclude(parser, "of files without masks: ")
    options.add_pattern(parser, "what the file says; else 2:4")
    options.add_model(parser, required=False)
    parser.set_defaults(dataset=None, data_dir="none", workers=0, device="cpu")


def run(arguments: argparse.Namespace) -> None:
    from maskllm4v.cli import inputs
    from maskllm4v.export.writing import file_name, folded_row, write
    from maskllm4v.tasks import open_task

    a = arguments
    if (a.row is None) == (a.checkpoint is None):
        raise ConfigError("say either a row of the experiment or --checkpoint FILE")
    if a.row is not None:
        experiment = load_experiment(a.params)
        experiment = experiment.model_copy(update={"runtime": experiment.runtime.model_copy(update={"device": "cpu"})})
        task = open_task(experiment, data_folder(experiment.data.name))
        folded, name = folded_row(experiment, task, a.row, a.seed_of_row), a.row
    else:
        if a.model is None:
            raise ConfigError("--checkpoint needs --model, timm's name of the architecture")
        experiment = options.experiment(a, data={"train": "train", "test": "val", "calibration": 1}, exclude=a.exclude)
        task = inputs.task_of(experiment)
        folded, name = _folded_file(a, experiment, task), a.checkpoint.name.partition(".")[0]
    path = a.output or Path(file_name(name, a.format, None if a.format == "mask" else a.dtype))
    write(path, a.format, folded, a.dtype, task)
    size, layers = path.stat().st_size, len(folded.masks)
    print(f"{path}: {size:,} bytes, {layers} layers {folded.pattern}" if layers else f"{path}: {size:,} bytes, dense")


def _folded_file(a: argparse.Namespace, experiment: Experiment, task: Task) -> Folded:
    from maskllm4v.cli import inputs
    from maskllm4v.export.files import Folded
    from maskllm4v.original import State, load_any
    from maskllm4v.patterns import NMPattern
    from maskllm4v.sealed import tensors_digest
    from maskllm4v.surgery import fold_

    found = load_any(a.checkpoint, ema=a.use_ema, pattern=a.pattern)
    model, masks = inputs.masked_model(a, experiment, task, found, a.checkpoint)
    model = fold_(model)
    if masks is not None:
        updated = found.zeroed if isinstance(found, State) else bool(masks.weights)
        return Folded(model, masks.masks, masks.pattern, experiment.model.name, masks.method, masks.base, updated)
    pattern = NMPattern(a.pattern or "2:4")
    base = tensors_digest(model.state_dict())
    zeros = _masks_of_zeros(model, pattern, experiment.model.dense_layers)
    return Folded(model, zeros, pattern, experiment.model.name, "unknown", base, updated=True)


def _masks_of_zeros(model: nn.Module, pattern: NMPattern, exclude: list[str]) -> dict[str, Tensor]:
    """The masks that a model's zeros amount to; a layer that breaks the pattern is an error."""
    from maskllm4v.packed import mask_of
    from maskllm4v.surgery import prunable_linears

    layers = prunable_linears(model, pattern, exclude=exclude)
    return {name: mask_of(layer.weight.detach(), pattern, name) for name, layer in layers.items()}
