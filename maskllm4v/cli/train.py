"""Learn masks on frozen dense weights (MaskLLM), from a prior. Writes them, and the curve of the training.

An interrupted training goes on where it was when the same command is given again. Several GPUs: torchrun
--nproc-per-node 4 -m maskllm4v train ...
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.cli import options
from maskllm4v.config import LearningSettings
from maskllm4v.utils.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from maskllm4v.sparsity.patterns import NMPattern
    from maskllm4v.tasks.base import Task

    Tensors = dict[str, Tensor]


class TrainFlags(options.Flags):
    """With how masks are learned."""

    learning: LearningSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        "--sparse-checkpoint",
        type=Path,
        metavar="FILE",
        help="the prior: masks of prune, or the original's .pt; without it every mask starts from chance",
    )
    parser.add_argument(
        "--output", type=options.mask_file, required=True, metavar="FILE", help="mask file to write (.safetensors)"
    )
    parser.add_argument("--curve", type=Path, metavar="FILE", help="CSV file to write (default: --output, in .csv)")
    options.add_pattern(parser, "the prior's, or 2:4")
    options.add_exclude(parser, "without a prior, or with the original's: ")
    options.add_convolutions(parser, "without a prior: ")
    _add_given(parser)
    _add_masks(parser.add_argument_group("masks"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_augmentation(parser.add_argument_group("augmentation, as in timm"))
    options.add_model(parser)
    options.add_data(parser, "train")
    options.add_runtime(parser, 128, "images a step, over all processes and micro-batches; the original's runs: 512")


def _add_given(parser: argparse.ArgumentParser) -> None:
    """Flags of the original's scripts that are so anyway, or that have another place here."""
    parser.add_argument("--sparsity-mode", choices=("maskllm",), help="always so; as in the original")
    parser.add_argument("--mask-only", action="store_true", help="always so; as in the original")
    parser.add_argument("--sched", choices=("cosine",), help="always so; as in the original")
    options.add_replaced(
        parser,
        {
            "--experiment": "say the whole name with --output",
            "--log-wandb": "the curve is a CSV file (--curve); runs of the pipeline go to MLflow",
            "--resume": "the same command again goes on",
            "--val-split": "nothing is measured while training; see validate",
        },
    )


def _add_masks(group: Any) -> None:
    two = {"type": float, "nargs": 2, "metavar": ("FIRST", "LAST")}
    group.add_argument("--tau-range", **two, help="temperature at the first and the last step (default 4 0.05)")
    group.add_argument("--scaling-range", **two, help="what logits are multiplied by, likewise (default 10 100)")
    group.add_argument("--gate-init-std", type=float, metavar="X", help="of the initial logits (default 0.2)")
    group.add_argument("--prior-strength", type=float, metavar="X", help="how far they are shifted (default 3)")
    group.add_argument("--sparse-weight-reg", type=float, metavar="X", help="λ of −λ·Σ(masked weight)² (default 1e-5)")
    group.add_argument("--hard", action="store_true", help="straight-through masks")
    group.add_argument(
        "--gate", choices=("candidates", "positions"), help="what has a logit: each mask of a group, or each position"
    )
    group.add_argument("--init", choices=("prior", "magnitude"), help="of the logits (default prior)")


def _add_optimisation(group: Any) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, metavar="N", help="length (default 20)")
    length.add_argument("--steps", type=int, metavar="N", help="length in steps instead")
    group.add_argument("--opt", metavar="NAME", help="optimiser, by timm's name (default adamw)")
    group.add_argument("--lr", type=float, metavar="X", help="first learning rate (default 1e-3)")
    group.add_argument("--min-lr", type=float, metavar="X", help="last learning rate (default 1e-4)")
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument("--warmup", type=float, metavar="SHARE", help="of the steps (default 0)")
    warmup.add_argument("--warmup-epochs", type=float, metavar="N", help="the same, of --epochs")
    group.add_argument("--weight-decay", type=float, metavar="X", help="(default 0.01)")
    group.add_argument("--clip-grad", type=float, metavar="NORM", help="(default 2; 0: off)")
    group.add_argument(
        "--anneal",
        choices=("step", "epoch"),
        help="how often learning rate, tau and scaling move (default step; the original: epoch)",
    )
    group.add_argument("--model-ema", action="store_true", help="average the logits")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, metavar="X", help="(default 0.9998)")
    group.add_argument("--grad-accum-steps", type=int, metavar="N", help="micro-batches that --batch-size is cut into")
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--channels-last", action="store_true", help="memory layout")
    group.add_argument("--torchcompile", action="store_true", help="torch.compile")
    group.add_argument("--log-interval", type=int, metavar="N", help="steps between points of the curve (default 10)")
    group.add_argument(
        "--save-minutes", type=float, metavar="N", help="between states to resume from (default 5; 0: none)"
    )
    options.add_amp(group)


def _add_augmentation(group: Any) -> None:
    group.add_argument("--aa", metavar="POLICY", help="auto-augmentation, e.g. rand-m8-inc1-mstd101 (default none)")
    group.add_argument("--reprob", type=float, metavar="P", help="of random erasing (default 0)")
    group.add_argument(
        "--remode", default="pixel", choices=("const", "rand", "pixel"), help="what is put there (default pixel)"
    )
    group.add_argument("--mixup", type=float, metavar="ALPHA", help="(default 0: off)")
    group.add_argument("--cutmix", type=float, metavar="ALPHA", help="(default 0: off)")
    group.add_argument("--smoothing", type=float, default=0.1, metavar="X", help="of labels (default 0.1)")
    group.add_argument("--hflip", type=float, default=0.5, metavar="P", help="of horizontal flips (default 0.5)")
    group.add_argument("--color-jitter", type=float, metavar="X", help="without --aa (default 0.4)")
    group.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth (default: the model's)")


def settings(arguments: argparse.Namespace) -> TrainFlags:
    """The flags as settings."""
    a = arguments
    epochs = 20.0 if a.epochs is None and a.steps is None else a.epochs
    warmup = a.warmup
    if a.warmup_epochs:
        if not epochs:
            raise ConfigError("--warmup-epochs goes with --epochs; with --steps say --warmup SHARE")
        warmup = a.warmup_epochs / epochs
    learning = options.set_only(
        epochs=epochs,
        steps=a.steps,
        batch_size=a.batch_size,
        accumulate=a.grad_accum_steps,
        optimizer=a.opt,
        lr=a.lr,
        min_lr=a.min_lr,
        warmup=warmup,
        weight_decay=a.weight_decay,
        clip_grad=a.clip_grad,
        anneal=a.anneal,
        log_every=a.log_interval,
        tau=a.tau_range,
        scaling=a.scaling_range,
        regularisation=a.sparse_weight_reg,
        init=a.init,
        gate=a.gate,
        prior_strength=a.prior_strength,
        gate_std=a.gate_init_std,
        ema=a.model_ema_decay if a.model_ema else None,
    )
    switches = {
        "hard": a.hard,
        "amp": options.amp(a),
        "grad_checkpointing": a.grad_checkpointing,
        "channels_last": a.channels_last,
        "compile": a.torchcompile,
    }
    task = options.set_only(
        auto_augment=a.aa,
        random_erasing=a.reprob,
        erasing_mode=a.remode,
        mixup=a.mixup,
        cutmix=a.cutmix,
        label_smoothing=a.smoothing,
        hflip=a.hflip,
        color_jitter=a.color_jitter,
        train_interpolation="random",
    )
    return options.settings(
        TrainFlags,
        a,
        data=options.images(a, "train"),
        task=task,
        model={
            "args": options.set_only(drop_path_rate=a.drop_path),
            "exclude": a.exclude,
            "convolutions": a.convolutions,
        },
        learning={**learning, **switches},
        runtime=options.set_only(checkpoint_minutes=a.save_minutes),
    )


def run(arguments: argparse.Namespace) -> None:
    import copy
    import shutil
    from contextlib import nullcontext

    from maskllm4v.checkpoints.format import tensors_digest
    from maskllm4v.checkpoints.masks import MaskCheckpoint, save_masks
    from maskllm4v.cli import inputs
    from maskllm4v.runs.curves import write_curve
    from maskllm4v.runs.records import FORMAT, versions
    from maskllm4v.sparsity.permutation import apply_permutations_
    from maskllm4v.sparsity.surgery import make_learnable
    from maskllm4v.training.mask_learning import CURVE_COLUMNS, learn_masks
    from maskllm4v.training.resume import Resume
    from maskllm4v.utils.distributed import leave
    from maskllm4v.utils.io import value_digest
    from maskllm4v.utils.locks import held
    from maskllm4v.utils.processes import is_main

    a = arguments
    flags, task, model, pattern, prior, permutations = start(a)
    spec, learning = flags.spec, flags.learning
    dense, base = copy.deepcopy(model), tensors_digest(model.state_dict())
    dense.cpu()
    manifest = inputs.prepare_data(spec, task)
    apply_permutations_(model, permutations)
    make_learnable(
        model,
        prior or None,
        pattern=pattern,
        prior_strength=learning.prior_strength,
        gate_std=learning.gate_std,
        init=learning.init,
        hard=learning.hard,
        gate=learning.gate,
        seed=a.seed,
        exclude=() if prior else spec.model.excluded_layers,
        convolutions=spec.model.convolutions,
    )
    states = inputs.CACHE / "resume" / value_digest([str(a.output.resolve())])[:16]
    prefixed = {f"permutation.{name}": order for name, order in permutations.items()}
    identity = {
        "settings": {"pattern": str(pattern), **flags.model_dump(mode="json", exclude={"runtime"})},
        "format": FORMAT,
        "inputs": {"manifest": manifest, "dense": base, "prior": tensors_digest({**prior, **prefixed})},
        "versions": versions(),
    }
    resume = Resume(states, a.seed, identity, minutes=spec.runtime.checkpoint_minutes)
    with held(states.with_suffix(".lock"), f"{a.output} is made") if is_main() else nullcontext():
        learned = learn_masks(model, task, learning, seed=a.seed, prior=prior or None, row=a.output.stem, resume=resume)
        inputs.keep_beside(a.output, dense, spec)
        if is_main():
            made = MaskCheckpoint(
                pattern, learned.masks, base, "maskllm", {}, prior, gate=learning.gate, permutations=permutations
            )
            save_masks(a.output, made)
            write_curve(a.curve or a.output.with_suffix(".csv"), CURVE_COLUMNS, learned.curve)
            shutil.rmtree(states, ignore_errors=True)
    inputs.say(
        f"{a.output}: {pattern} masks of {len(learned.masks)} layers, {learned.cost.samples_per_second:.0f} images/s"
    )
    leave()


def start(a: argparse.Namespace) -> tuple[TrainFlags, Task, nn.Module, NMPattern, Tensors, Tensors]:
    """Settings, task, dense model, pattern, prior masks (empty without a prior) and permutations to start from.

    Raises:
        CheckpointError: the prior has no masks, or is of another model or pattern, or of one with permuted channels.
    """
    from maskllm4v.cli import inputs
    from maskllm4v.sparsity.patterns import NMPattern

    found = None if a.checkpoint is None else inputs.masks_in(a.checkpoint, a.pattern)
    pattern = NMPattern(found.pattern if found is not None and found.pattern is not None else a.pattern or "2:4")
    flags = settings(a)
    spec = flags.spec
    task = inputs.task_of(spec)
    if found is None:
        return flags, task, inputs.dense_model(a, spec, task), pattern, {}, {}
    model, masks = inputs.start_from(a, spec, task, found, a.checkpoint)
    return flags, task, model, pattern, dict(masks.masks), dict(masks.permutations)
