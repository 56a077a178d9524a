"""Measure a model, dense or under masks. Prints the original's JSON object; further facts go to standard error.

Masks are files of prune, train or update, packed ones of export, or the original's: .pt with masks, .pth.tar with
logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskllm4v.cli import options
from maskllm4v.config import TaskSpec
from maskllm4v.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from maskllm4v.checkpoints.masks import MaskCheckpoint
    from maskllm4v.tasks.base import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="masks, or with --sparsity-mode dense a state dict of weights"
    )
    parser.add_argument(
        "--sparsity-mode",
        choices=("dense", "sparse", "maskllm"),
        default="dense",
        help="dense (default), sparse: under the file's masks, maskllm: under learned ones, whose logits count as "
        "parameters in the JSON, as in the original",
    )
    parser.add_argument(
        "--use-ema",
        action=argparse.BooleanOptionalAction,
        help="of the original's and timm's files take the average (default: where there is one); "
        "the original's table was measured with --no-use-ema",
    )
    parser.add_argument("--results-file", type=Path, metavar="FILE", help="write the JSON object there, too")
    options.add_exclude(parser, "layers that have no mask in the original's files: ")
    options.add_pattern(parser, "what the file says; for masks that say nothing 2:4")
    options.add_amp(parser)
    options.add_model(parser)
    options.add_data(parser, "val")
    options.add_runtime(parser, 256, "images at a time")


def run(arguments: argparse.Namespace) -> None:
    import json

    from maskllm4v.cli import inputs
    from maskllm4v.utils.distributed import leave
    from maskllm4v.utils.io import write_text
    from maskllm4v.utils.processes import is_main

    a = arguments
    spec = options.settings(
        options.Flags,
        a,
        data=options.images(a, "val"),
        task={"eval_batch_size": a.batch_size, "eval_amp": options.amp(a)},
        model={"exclude": a.exclude},
    ).spec
    task = inputs.task_of(spec)
    model, masks = measured(a, spec, task)
    pruned = 0 if masks is None else sum(int((~mask).sum()) for mask in masks.masks.values())
    logits = logits_of(masks) if a.sparsity_mode == "maskllm" else 0
    inputs.prepare_data(spec, task)
    metrics = task.evaluate(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    counts = f"parameters: {total:,}, of which {total - pruned:,} kept" + (f"; {logits:,} logits" if logits else "")
    inputs.say(f"{counts}\ncross-entropy {metrics['nll']:.4f} nats, calibration error {metrics['ece']:.2f} %")
    if is_main():
        text = json.dumps(task.summary(model, metrics, logits), indent=4)
        if a.results_file is not None:
            write_text(a.results_file, f"{text}\n")
        print(text, flush=True)
    leave()


def measured(a: argparse.Namespace, spec: TaskSpec, task: Task) -> tuple[nn.Module, MaskCheckpoint | None]:
    """The model to measure, masks folded into its weights, and the masks.

    Raises:
        CheckpointError: the file is not what ``--sparsity-mode`` says, or does not fit the model.
    """
    from maskllm4v.checkpoints.masks import MaskCheckpoint
    from maskllm4v.checkpoints.third_party import load_any
    from maskllm4v.cli import inputs
    from maskllm4v.sparsity.surgery import fold_

    mode, path = a.sparsity_mode, a.checkpoint
    if path is None:
        if mode != "dense":
            raise ConfigError(f"--sparsity-mode {mode} needs --checkpoint, a file with masks")
        return inputs.dense_model(a, spec, task), None
    found = load_any(path, ema=a.use_ema, pattern=a.pattern)
    learned = found.method == "maskllm" if isinstance(found, MaskCheckpoint) else found.learned
    if mode != "dense" and not found.masks:
        raise CheckpointError(f"{path} holds no masks, so it cannot be measured as {mode!r}, only as 'dense'")
    if mode == "dense" and found.masks:
        raise CheckpointError(f"{path} holds masks; say --sparsity-mode {'maskllm' if learned else 'sparse'}")
    if mode == "maskllm" and not learned:
        raise CheckpointError(f"{path} holds masks, but no learned ones; say --sparsity-mode sparse")
    model, masks = inputs.masked_model(a, spec, task, found, path)
    return fold_(model), masks


def logits_of(masks: MaskCheckpoint | None) -> int:
    """How many logits learned masks were made from."""
    from maskllm4v.sparsity.parameterization import gate_of

    if masks is None or masks.pattern is None:
        return 0
    groups = sum(mask.numel() // masks.pattern.m for mask in masks.masks.values())
    return groups * gate_of(masks.gate, masks.pattern).logits
