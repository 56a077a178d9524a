"""Update the kept weights to compensate for the pruned ones. Writes both, and the dense weights beside them.

The masks stay, and no weight is trained: a few images are all that it takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from maskllm4v.cli import options
from maskllm4v.config import UpdateSettings


class UpdateFlags(options.Flags):
    """With a method."""

    update: UpdateSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="masks of prune or train, or the original's: .pt, .pth.tar",
    )
    parser.add_argument(
        "--save-model", type=options.mask_file, required=True, metavar="FILE", help="mask file to write (.safetensors)"
    )
    parser.add_argument(
        "--update",
        default="least_squares",
        choices=("least_squares", "sparsegpt"),
        help="method (default least_squares)",
    )
    parser.add_argument(
        "--target",
        choices=("asymmetric", "symmetric"),
        help="what a layer's outputs are fitted to: the dense network's, or those of its dense weights on the inputs "
        "that it has come to see (default: least_squares asymmetric, sparsegpt symmetric, all that it knows)",
    )
    parser.add_argument(
        "--damping",
        type=float,
        metavar="X",
        help="share of the mean diagonal of the inputs' Hessian (default: least_squares 0.1, sparsegpt 0.01)",
    )
    options.add_calibration(parser)
    options.add_exclude(parser, "layers that have no mask in the original's files: ")
    options.add_pattern(parser, "what the file says; for masks that say nothing 2:4")
    options.add_model(parser)
    options.add_data(parser, "train", "val")
    options.add_runtime(parser, 128, "images at a time while calibrating")


def run(arguments: argparse.Namespace) -> None:
    import copy
    from dataclasses import replace

    from maskllm4v.checkpoints.apply import install
    from maskllm4v.checkpoints.masks import save_masks
    from maskllm4v.cli import inputs
    from maskllm4v.oneshot.weight_update import update_weights_
    from maskllm4v.sparsity.parameters import dense_weights
    from maskllm4v.utils.distributed import leave
    from maskllm4v.utils.processes import is_main

    a = arguments
    found = inputs.masks_in(a.checkpoint, a.pattern)
    flags = options.settings(
        UpdateFlags,
        a,
        data=options.images(a, a.calibration_split, a.nsamples),
        model={"exclude": a.exclude},
        update=options.set_only(update=a.update, target=a.target, damping=a.damping, batch_size=a.batch_size),
    )
    spec, how = flags.spec, flags.update
    task = inputs.task_of(spec)
    model, masks = inputs.start_from(a, spec, task, found, a.checkpoint)
    dense = copy.deepcopy(model)  # written at the end: a command that fails leaves nothing
    dense.cpu()
    inputs.prepare_data(spec, task, labels=False)
    update_weights_(
        install(model, replace(masks, weights={}), str(a.checkpoint)),
        how.update,
        calibration=task.calibration(how.batch_size, a.seed),
        target=how.target,
        damping=how.damping,
    )
    weights = dense_weights(model, masks.masks)
    inputs.keep_beside(a.save_model, dense, spec)
    if is_main():
        save_masks(a.save_model, replace(masks, method=how.update, weights=weights))
    inputs.say(f"{a.save_model}: {masks.pattern} masks of {len(weights)} layers, weights updated by {how.update}")
    leave()
