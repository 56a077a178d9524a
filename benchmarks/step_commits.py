"""What a training step costs at two commits, in milliseconds of processor time.

    python -m benchmarks.step_commits REVISION [--models digits vit_tiny] [--repeats 15]

Both commits are cloned, and a process in each takes steps when it is asked to: of dense training and of mask learning,
on one thread, digits under the pin of exact runs. All of them take turns in every repetition, so that a busy spell hits
all alike.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Timing, ratio, threads
from benchmarks.results import Row, save

VARIANTS = ("dense", "ours", "ours_distilled")
EXACT = ("digits",)
SECONDS = 0.3  # of steps at a time, about
WORKER = """
import sys, time
from maskllm4v.utils import determinism
name, exact = sys.argv[1], sys.argv[2] == "exact"
if exact:
    determinism.pin_kernels()
import torch
if exact:
    determinism.pin_torch()
torch.set_num_threads(1)
from benchmarks.train_step import make
from benchmarks.workloads import workloads
steps = {variant: make(variant, workloads()[name], torch.device("cpu")) for variant in sys.argv[3:]}
for line in sys.stdin:
    variant, count = line.split()
    start = time.process_time()
    for _ in range(int(count)):
        steps[variant]()
    print((time.process_time() - start) / int(count), flush=True)
"""
NOTES = [
    "ms: of processor time of a step as the training loop takes it, on one thread; medians of n repetitions, in which"
    " commits and kinds take turns.",
    "ratio: of after to before. to_dense: of a step to a dense one at the later commit. Both repetition by repetition.",
]


class Steps:
    """A process that takes steps of a model in a clone."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def seconds(self, variant: str, count: int) -> float:
        """What one of so many steps took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(variant, count, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


@contextmanager
def steps_in(folder: Path, model: str, variants: Sequence[str] = VARIANTS) -> Iterator[Steps]:
    """Inside, the process runs."""
    command = [sys.executable, "-c", WORKER, model, "exact" if model in EXACT else "", *variants]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Steps(process)
        finally:
            process.kill()


def measure(model: str, clones: dict[str, Path], repeats: int) -> list[Row]:
    """A row per kind of step."""
    with ExitStack() as stack:
        steps = {name: stack.enter_context(steps_in(folder, model)) for name, folder in clones.items()}
        candidates = [(name, variant) for variant in VARIANTS for name in clones]
        first = {candidate: steps[candidate[0]].seconds(candidate[1], 2) for candidate in candidates}
        counts = {variant: max(1, round(SECONDS / first["after", variant])) for variant in VARIANTS}
        samples: dict[tuple[str, str], list[float]] = {candidate: [] for candidate in candidates}
        for number in range(repeats):
            for name, variant in candidates if number % 2 else candidates[::-1]:
                samples[name, variant].append(steps[name].seconds(variant, counts[variant]))
    times = {candidate: Timing.of(found) for candidate, found in samples.items()}
    return [_row(model, variant, times) for variant in VARIANTS]


def _row(model: str, variant: str, times: dict[tuple[str, str], Timing]) -> dict[str, Any]:
    before, after = times["before", variant], times["after", variant]
    milliseconds = {"before_ms": 1e3 * before.median, "after_ms": 1e3 * after.median}
    ratios = {"ratio": ratio(after, before).median, "to_dense": ratio(after, times["after", "dense"]).median}
    return {"model": model, "variant": variant, "n": after.n, **milliseconds, **ratios}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_commits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("revision", help="the commit before; the one after is HEAD")
    parser.add_argument("--models", nargs="+", default=["digits", "vit_tiny"], help="of benchmarks.workloads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        clones = {"before": Path(folder) / "before", "after": Path(folder) / "after"}
        for clone, revision in zip(clones.values(), (given.revision, "HEAD"), strict=True):
            subprocess.run(["git", "clone", "-q", ".", str(clone)], check=True)
            subprocess.run(["git", "checkout", "-q", revision], cwd=clone, check=True)
        for model in given.models:
            rows += measure(model, clones, given.repeats)
    with threads(1):  # as in the processes that were measured
        save("step_commits", {"steps": rows}, NOTES, given.out, device=torch.device("cpu"))


if __name__ == "__main__":
    main()
