"""A whole optimiser step of a vision transformer: dense fine-tuning, mask learning here, the textbook's.

    python -m benchmarks.train_step [--models vit_tiny vit_base] [--variants dense ours] [--repeats 7] [--quick]

A step is forward, backward, clipping and AdamW on one batch of random images, random weights; no data is loaded.
All variants of a model run in turn. Ratios are medians over repetitions of a variant's time to the dense step's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.baselines.dense import Dense
from benchmarks.baselines.textbook import Textbook
from benchmarks.measure import Timing, ceilings, interleaved, peak_bytes, ratio, saved_bytes, state_bytes, threads
from benchmarks.results import Row, save
from benchmarks.workloads import RandomImages, Workload, workloads
from maskllm4v.config import LearningSettings
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.surgery import make_learnable
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.training.engine import mixed_precision
from maskllm4v.training.mask_learning import MaskLearner
from maskllm4v.training.trainer import TrainTarget
from maskllm4v.utils.devices import pick_device

VARIANTS = {
    "dense": "dense weights, fused AdamW",
    "ours": "masks learned",
    "ours_distilled": "masks learned, self-distilled",
    "ours_compiled": "masks learned, torch.compile of the model",
    "textbook": "textbook masks, default AdamW",
}
STATISTICS = ("n", "ms", "fastest_ms", "slowest_ms", "ratio", "ratio_low", "ratio_high")
MB = 2**20


class Step:
    """One step of a learner, as the training loop takes it, on one batch again and again.

    Args:
        learner: what is trained.
        task: gives the batch and the loss.
        learning: precision, clipping, batch size.
        compiled: whether the model is compiled.
    """

    def __init__(
        self, learner: TrainTarget, task: RandomImages, learning: LearningSettings, *, compiled: bool = False
    ) -> None:
        self.learner, self.task, self.clip = learner, task, learning.clip_grad
        self.batch = task.batch(learning.batch_size)
        model: Any = torch.compile(learner.model) if compiled else learner.model
        self.model = mixed_precision(model, task.device, learning.amp)
        self.number = 0
        learner.train_mode()

    def forward(self) -> Tensor:
        """What is minimised, with its graph."""
        self.learner.begin_step(self.number, 0.0, 0.0)
        self.learner.begin_micro_step(NoiseKey(0, self.number))
        self.number += 1
        return self.learner.loss(self.model, self.task, self.batch)[0]

    def __call__(self) -> None:
        self.forward().backward()
        torch.nn.utils.clip_grad_norm_(self.learner.tensors, self.clip or float("inf"))
        self.learner.optimizer.step()
        self.learner.optimizer.zero_grad(set_to_none=True)
        self.learner.end_step(self.number - 1)

    def trained(self) -> int:
        """Parameters that the optimiser updates."""
        return sum(tensor.numel() for tensor in self.learner.tensors)

    def saved(self) -> int:
        """Bytes kept for backward, but parameters, buffers and the batch."""
        return saved_bytes(self.forward, [*self.learner.model.parameters(), *self.learner.model.buffers(), *self.batch])

    def peak(self) -> int:
        """Bytes of parameters, optimiser state and batch, and the most that a step needs on top."""
        state = state_bytes(self.learner.model, self.learner.optimizer, *self.batch)
        return state + peak_bytes(self, self.task.device)


def make(variant: str, workload: Workload, device: torch.device) -> Step:
    """A variant's step on a model of its own."""
    spec, learning = workload.spec, workload.learning
    model, task = workload.build(device), RandomImages(spec, device)
    exclude = spec.model.excluded_layers
    if variant == "dense":
        return Step(Dense(model), task, learning)
    if variant == "textbook":
        learner = Textbook(
            model,
            workload.pattern,
            exclude=exclude,
            hard=learning.hard,
            lr=learning.lr,
            weight_decay=learning.weight_decay,
            regularisation=learning.regularisation,
        )
        return Step(learner, task, learning)
    make_learnable(model, None, pattern=workload.pattern, exclude=exclude, hard=learning.hard)
    compiled = variant == "ours_compiled"
    changes: dict[str, Any] = {"distillation": 1.0} if variant == "ours_distilled" else {"compile": compiled}
    settings = learning.model_copy(update=changes)
    ours = MaskLearner(model, task, settings, prior=None, row=variant, on_point=None)
    return Step(ours, task, learning, compiled=compiled)


def measure(
    workload: Workload, variants: list[str], device: torch.device, *, repeats: int, warmup: int, quick: bool
) -> tuple[list[Row], list[Row]]:
    """A row a variant; ratios are to the first of them. Then one line each against the roofline."""
    torch.compiler.reset()  # or a second model is compiled for shapes that vary
    steps = {variant: make(variant, workload, device) for variant in variants}
    times = interleaved(dict[str, Callable[[], Any]](steps), repeats=repeats, warmup=warmup)
    linears = prunable_linears(workload.build(device), exclude=workload.spec.model.excluded_layers)
    weights = sum(linear.weight.numel() for linear in linears.values())
    first, rows, roof = variants[0], list[Row](), list[Row]()
    precision = {"no": "fp32"}.get(workload.learning.amp, workload.learning.amp)
    most = ceilings(device, bf16=precision == "bf16", quick=quick)
    for variant, step in steps.items():
        saved = step.saved()
        base = rows[0]["saved_mb"] if rows else saved / MB
        assert not isinstance(base, str)
        rows.append(
            {
                "model": workload.name,
                "variant": variant,
                "batch": workload.learning.batch_size,
                "precision": precision,
                "threads": torch.get_num_threads(),
                **statistics(times[variant], times[first]),
                "peak_mb": step.peak() / MB,
                "saved_mb": saved / MB,
                "saved_beyond_bytes": (saved - base * MB) / weights,
            }
        )
        if variant in ("dense", "ours"):
            masked = 0 if variant == "dense" else weights
            line = roofline.step_row(
                step, times[variant], most, trained=step.trained(), masked=masked, precision=precision
            )
            roof.append({"model": workload.name, "variant": variant, **line})
    return rows, roof


def statistics(time: Timing, first: Timing) -> Row:
    """Milliseconds, and the ratio to the first candidate's."""
    relative = ratio(time, first)
    values = (1e3 * time.median, 1e3 * time.low, 1e3 * time.high, relative.median, relative.low, relative.high)
    return dict(zip(STATISTICS, (time.n, *values), strict=True))


NOTES = [
    "ratio: of a variant's time to the dense step's of the same repetition; median, lowest and highest of n.",
    "peak_mb: parameters, optimiser state, batch, and the most that a step allocates on top, in MiB.",
    "saved_mb: what one forward pass keeps for backward, but parameters and images, in MiB;"
    " saved_beyond_bytes: what of it goes beyond the dense step's, in bytes a masked weight.",
    "roofline: products_s, the step's matrix products and attention at the device's measured peak; memory_s, bytes that"
    " AdamW and the mask operation have to move at its measured bandwidth; share: both of the time measured."
    " Activations, normalisation and softmax are left out.",
    *(f"{name}: {text}." for name, text in VARIANTS.items()),
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(workloads()), help="by default all that are for the device")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="by default all; quick: none compiled")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny models, two repetitions: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    known = workloads(quick=given.quick)
    models = given.models or [name for name, workload in known.items() if workload.device in (None, device.type)]
    variants = given.variants or [name for name in VARIANTS if not (given.quick and name == "ours_compiled")]
    repeats, warmup = (2, 1) if given.quick else (given.repeats, 2)
    sections: dict[str, list[Row]] = {"steps": [], "roofline": []}
    with threads(given.threads):
        for name in models:
            rows, roof = measure(known[name], variants, device, repeats=repeats, warmup=warmup, quick=given.quick)
            sections["steps"] += rows
            sections["roofline"] += roof
        save("train_step", sections, NOTES, given.out, device=device)


if __name__ == "__main__":
    main()
