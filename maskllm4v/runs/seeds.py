"""Independent seeds side by side, with results that do not depend on how many run at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from maskllm4v.config import Experiment
from maskllm4v.utils.devices import pick_device
from maskllm4v.utils.errors import ConfigError, TrainingError
from maskllm4v.utils.processes import end_with_parent, world_size

T = TypeVar("T")


def map_seeds(experiment: Experiment, seeds: list[int], function: Callable[[int, int], T]) -> list[T]:
    """``[function(seed, position), ...]`` for some seeds of an experiment.

    Under the exact pin every process computes on one thread, so the seeds run in forked processes, all
    at once unless ``runtime.seed_processes`` says otherwise. More processes than cores are no loss: three
    seeds on two cores share them evenly. Anything else runs one seed after the other, unless
    ``runtime.seed_processes`` asks for more on a CPU, whose cores they then divide.

    Raises:
        TrainingError: a forked process was killed; the others were asked to save and end.
        SystemExit: on SIGTERM, after the forked processes have saved and ended.
    """
    processes = min(len(seeds), seed_processes(experiment))
    if processes <= 1:
        return [function(seed, 0) for seed in seeds]
    # Forked, so that torch is imported once and the function need not be picklable; nothing has started
    # a thread by then.
    context = multiprocessing.get_context("fork")
    threads = None if experiment.exact else max(1, (os.cpu_count() or 1) // processes)
    with (
        _passed_on() as told,
        ProcessPoolExecutor(processes, context, initializer=_prepare, initargs=(function, threads)) as pool,
    ):
        try:
            return list(pool.map(_call, seeds, range(len(seeds))))
        except BrokenProcessPool:
            if told:
                raise SystemExit(128 + told[0]) from None
            raise TrainingError("a process that computed a seed was killed (out of memory?)") from None


def seed_processes(experiment: Experiment) -> int:
    """How many processes :func:`map_seeds` uses at most."""
    runtime = experiment.runtime
    if world_size() > 1 or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    if experiment.exact:
        return runtime.seed_processes or 2 * (os.cpu_count() or 1)
    if runtime.seed_processes > 1 and pick_device(runtime.device).type != "cpu":
        raise ConfigError("runtime.seed_processes is for CPUs; on a GPU seeds run one after the other")
    return runtime.seed_processes or 1


_function: Callable[[int, int], Any] | None = None  # of a forked process


def _prepare(function: Callable[[int, int], Any], threads: int | None) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _call(seed: int, position: int) -> Any:
    assert _function is not None
    try:
        return _function(seed, position)
    except (SystemExit, KeyboardInterrupt) as asked:
        # Asked to end: the pool would give this process the next seed.
        sys.stdout.flush()
        os._exit(asked.code if isinstance(asked, SystemExit) and isinstance(asked.code, int) else 1)


@contextmanager
def _passed_on() -> Iterator[list[int]]:
    """Inside, SIGTERM goes to the forked processes, which save and end; gives the signals that came."""
    told: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        told.append(number)
        for process in multiprocessing.active_children():
            process.terminate()

    try:
        before = signal.signal(signal.SIGTERM, pass_on)
    except ValueError:  # not in the main thread: whoever runs this has to end it
        yield told
        return
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
