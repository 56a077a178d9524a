"""What an exact step costs: products by MKL or by NumPy, masks drawn layer by layer or joined.

    python -m benchmarks.exact_step [--repeats 15] [--quick]

A step of the digits table under the pin, on one thread: of dense training, mask learning and self-distilled learning.
All candidates of a kind run in turn. `before` is how exact runs computed once, but for loop and seeding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskllm4v.config import load_experiment
from maskllm4v.utils import determinism

CANDIDATES = {  # products by NumPy, masks joined
    "before": (False, False),
    "products": (True, False),
    "masks": (False, True),
    "now": (True, True),
}
NOTES = [
    "ms: of processor time of one step, as the training loop takes it; ratio: to before, repetition by repetition.",
    "before: MKL's products under MKL_CBWR=COMPATIBLE, one call a layer. products: NumPy's OpenBLAS in their place."
    " masks: all layers' in one call. now: both.",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two repetitions of a step: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    determinism.pin_kernels()
    import torch

    determinism.pin_torch()
    from benchmarks.results import save

    rows = [row for kind in ("dense", "ours", "ours_distilled") for row in measured(kind, given.repeats, given.quick)]
    save("exact_step", {"steps": rows}, NOTES, given.out, device=torch.device("cpu"))


def measured(kind: str, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """A row per candidate; ``kind`` is a variant of :mod:`benchmarks.train_step`."""
    import torch

    from benchmarks.measure import interleaved, ratio
    from benchmarks.train_step import make
    from benchmarks.workloads import Workload
    from maskllm4v.utils.determinism import portable

    experiment = load_experiment(Path("experiments/digits.yaml"))
    learning = experiment.learned["digits-maskllm-short-magnitude"]
    workload = Workload("digits", experiment.task_spec(), experiment.pattern, learning, None)
    count = 1 if quick else 20

    def candidate(numpy: bool, joined: bool) -> Callable[[], None]:
        step = make(kind, workload, torch.device("cpu"))
        if kind != "dense" and not joined:
            for draw in step.learner.joined:  # type: ignore[attr-defined]
                draw.part()
            step.learner.joined = []  # type: ignore[attr-defined]

        def run() -> None:
            (portable.install if numpy else portable.uninstall)()
            for _ in range(count):
                step()

        return run

    names = [name for name, (_, joined) in CANDIDATES.items() if kind != "dense" or not joined]
    calls = {name: candidate(*CANDIDATES[name]) for name in names}
    times = interleaved(calls, repeats=2 if quick else repeats, clock=time.process_time)
    portable.install()
    return [
        {
            "kind": kind,
            "candidate": name,
            "n": time.n,
            "ms": 1e3 * time.median / count,
            "ratio": ratio(time, times["before"]).median,
        }
        for name, time in times.items()
    ]


if __name__ == "__main__":
    main()
