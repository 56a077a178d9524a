"""Prune a model in one shot: magnitude, Wanda, RIA, SparseGPT. Writes its masks, and the dense weights beside them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from maskllm4v.cli import options
from maskllm4v.config import PriorSettings


class PruneFlags(options.Flags):
    """With a method."""

    prior: PriorSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-model", type=options.mask_file, required=True, metavar="FILE", help="mask file to write (.safetensors)"
    )
    parser.add_argument(
        "--pruner",
        default="magnitude",
        choices=("magnitude", "wanda", "ria", "sparsegpt", "random"),
        help="method (default magnitude)",
    )
    parser.add_argument(
        "--enable-update", action="store_true", help="sparsegpt: correct the kept weights for the pruned ones"
    )
    parser.add_argument(
        "--propagate",
        choices=("dense", "pruned"),
        help="what later layers see while calibrating (default: wanda dense, as in the original; others pruned)",
    )
    parser.add_argument(
        "--permutation",
        choices=("none", "greedy"),
        default="none",
        help="greedy: first put hidden channels into an order of which masks keep more; outputs stay the same "
        "(default none)",
    )
    options.add_calibration(parser)
    options.add_exclude(parser)
    options.add_convolutions(parser)
    options.add_pattern(parser, "2:4")
    options.add_model(parser)
    options.add_data(parser, "train", "val")
    options.add_runtime(parser, 128, "images at a time while calibrating")


def run(arguments: argparse.Namespace) -> None:
    import copy

    from maskllm4v.checkpoints.masks import MaskCheckpoint, save_masks
    from maskllm4v.cli import inputs
    from maskllm4v.oneshot.permute import permute_channels_
    from maskllm4v.oneshot.prune import calibrates, prune
    from maskllm4v.sparsity.parameters import dense_weights
    from maskllm4v.sparsity.patterns import NMPattern
    from maskllm4v.utils.distributed import leave
    from maskllm4v.utils.processes import is_main

    a, pattern = arguments, NMPattern(arguments.pattern or "2:4")
    prior = {"method": a.pruner, "update_weights": a.enable_update, "propagate": a.propagate}
    flags = options.settings(
        PruneFlags,
        a,
        data=options.images(a, a.calibration_split, a.nsamples),
        model={"exclude": a.exclude, "convolutions": a.convolutions},
        prior={**prior, "permutation": a.permutation, "batch_size": a.batch_size},
    )
    spec, how = flags.spec, flags.prior
    task = inputs.task_of(spec)
    model = inputs.dense_model(a, spec, task)
    dense = copy.deepcopy(model)  # written at the end: a command that fails leaves nothing

    def calibration() -> Iterator[Any]:  # only methods that look at inputs ask for them
        inputs.prepare_data(spec, task, labels=False)
        (part,) = task.calibration(how.batch_size, a.seed)
        yield from part.batches

    layers: Any = {"exclude": spec.model.excluded_layers, "on_misfit": spec.model.on_misfit}
    shown = calibration() if calibrates(how.method) else None
    permutations: dict[str, Any] = {}
    if how.permutation == "greedy":
        permutations = permute_channels_(
            model, pattern, calibration=shown, forward=task.forward, tell=inputs.say, **layers
        )
    masks = prune(
        model,
        how.method,
        pattern=pattern,
        calibration=calibration(),
        update_weights=how.update_weights,
        propagate=how.propagate,
        forward=task.forward,
        convolutions=spec.model.convolutions,
        seed=a.seed,
        tell=inputs.say,
        **layers,
    )
    weights = dense_weights(model, masks) if how.update_weights else {}
    base = inputs.keep_beside(a.save_model, dense, spec)
    if is_main():
        found = MaskCheckpoint(pattern, masks, base, how.method, weights, prior={}, permutations=permutations)
        save_masks(a.save_model, found)
    updated = ", weights updated" if weights else ""
    inputs.say(f"{a.save_model}: {pattern} masks of {len(masks)} layers by {how.method}{updated}")
    leave()
