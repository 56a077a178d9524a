"""How every stage starts and ends: processes, the pin before numpy and torch, errors in a line, timings aside."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.runs.leftovers import tidy_up
from maskllm4v.utils import determinism, distributed
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.orphans import end_with_dvc
from maskllm4v.utils.processes import is_main, share_cores

LAUNCHER = "MASKLLM4V_LAUNCHER"  # e.g. "srun torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d ..."


def run(stage: str, main: Callable[[Experiment, str], None], *, takes: str | None = "row", torch: bool = True) -> None:
    """Run a stage's ``main(experiment, row)`` from the command line.

    Args:
        stage: its name.
        main: its work.
        takes: what its one argument is called, or None.
        torch: whether it computes with torch: on several processes if asked to, and under the exact pin.
    """
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}")
    if takes is not None:
        parser.add_argument(takes)
    key = getattr(parser.parse_args(), takes) if takes is not None else ""
    begin = time.perf_counter()
    end_with_dvc()
    try:
        experiment = load_experiment()
        if torch and "LOCAL_RANK" not in os.environ and (launcher := _launcher(experiment)):
            sys.stdout.flush()
            os.execvp(launcher[0], [*launcher, "-m", f"stages.{stage}", key])
        if "LOCAL_WORLD_SIZE" in os.environ:  # started by somebody else's launcher
            share_cores(int(os.environ["LOCAL_WORLD_SIZE"]))
        if experiment.exact:
            determinism.pin_kernels()
            if torch:
                determinism.pin_torch()
        main(experiment, key)
        distributed.leave()
        if is_main():
            tidy_up(experiment, stage, key, seconds=time.perf_counter() - begin)
    except UserError as error:
        sys.exit(f"{stage}{f' {key}' if key else ''}: {error}")


def _launcher(experiment: Experiment) -> list[str]:
    """What starts several processes; empty for one. The number is no part of a stage's command."""
    if experiment.exact:  # sums over several processes have other bits
        return []
    if LAUNCHER in os.environ:
        return shlex.split(os.environ[LAUNCHER])
    runtime, count = experiment.runtime, experiment.runtime.processes
    if not count and runtime.device in ("auto", "cuda"):
        import torch

        count = torch.cuda.device_count()
    if count < 2:
        return []
    share_cores(count)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
