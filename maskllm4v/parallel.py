"""Independent seeds side by side, with results that do not depend on how many run at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from maskllm4v.config import Experiment

T = TypeVar("T")


def map_seeds(experiment: Experiment, function: Callable[[int, int], T]) -> list[T]:
    """``[function(seed, position), ...]`` for all seeds of an experiment.

    Under the exact pin every process computes on one thread, so the seeds run in forked processes, all
    at once unless ``runtime.seed_processes`` says otherwise. More processes than cores are no loss: three
    seeds on two cores share them evenly. Anything else runs one seed after the other.
    """
    seeds, positions = experiment.seeds, range(len(experiment.seeds))
    processes = seed_processes(experiment)
    if processes == 1:
        return [function(seed, 0) for seed in seeds]
    # Forked, so that torch is imported once and the function need not be picklable; nothing has started
    # a thread by then.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=_remember, initargs=(function,)) as pool:
        return list(pool.map(_call, seeds, positions))


def seed_processes(experiment: Experiment) -> int:
    """How many processes :func:`map_seeds` uses."""
    seeds = len(experiment.seeds)
    if not experiment.exact or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return min(seeds, experiment.runtime.seed_processes or 2 * (os.cpu_count() or 1))


_function: Callable[[int, int], Any] | None = None  # of a forked process


def _remember(function: Callable[[int, int], Any]) -> None:
    global _function
    _function = function


def _call(seed: int, position: int) -> Any:
    assert _function is not None
    return _function(seed, position)
