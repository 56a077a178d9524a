"""Timing, saved bytes, peak memory and a device's ceilings, measured one way in all benchmarks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Timing:
    """What repetitions took, in seconds (or, from :func:`ratio`, in units of another candidate).

    Attributes:
        median: of all repetitions.
        low, high: the fastest and the slowest one.
        n: how many repetitions.
        samples: each repetition, in order.
    """

    median: float
    low: float
    high: float
    n: int
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Iterable[float]) -> Timing:
        """Sum samples up."""
        found = tuple(samples)
        return cls(statistics.median(found), min(found), max(found), len(found), found)


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time candidates in turn: each runs once in a repetition, so that a busy spell hits all of them alike.

    Args:
        candidates: what to run, by name. Their results are dropped outside the time measured.
        repeats: repetitions that count.
        warmup: repetitions before them that do not.
        clock: seconds; ``time.process_time`` of what one thread computes does not count what others do meanwhile.

    Returns:
        Seconds a call, by name; waits for CUDA before and after each call where there is CUDA.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with _no_collection():
        for repetition in range(warmup + repeats):
            for name, call in candidates.items():
                synchronize()
                begin = clock()
                result = call()
                synchronize()
                seconds = clock() - begin
                del result
                if repetition >= warmup:
                    samples[name].append(seconds)
    return {name: Timing.of(found) for name, found in samples.items()}


def ratio(one: Timing, other: Timing) -> Timing:
    """How many times longer ``one`` took, repetition by repetition of the same :func:`interleaved` run."""
    return Timing.of(a / b for a, b in zip(one.samples, other.samples, strict=True))


def synchronize() -> None:
    """Wait for everything queued on the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes on that many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def saved_bytes(forward: Callable[[], Any], beyond: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward once ``forward`` has run, each storage counted once.

    Args:
        forward: builds the graph; its result is dropped.
        beyond: inputs that exist anyway (parameters, images) and do not count.
    """
    ignored = {_storage(tensor) for tensor in beyond}
    kept: dict[int, tuple[int, Tensor]] = {}  # with the tensor, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for storage, (size, _) in kept.items() if storage not in ignored)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most tensor memory that a call holds at a time, beyond what lies there when it begins, in bytes.

    On CUDA the allocator says. On a CPU the allocations that the profiler sees are added up: unlike the
    process's peak they know nothing of memory that malloc keeps back. Scratch space inside oneDNN or MKL counts
    on neither.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _drop(call())
        synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False, acc_events=True) as profile:
        _drop(call())
    events = profile.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    held = most = 0
    for size in sizes:
        held += size
        most = max(most, held)
    return most


def _drop(_: Any) -> None:
    """Take a result, so that it is freed here and now."""


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *inputs: Tensor) -> int:
    """Bytes of parameters, buffers, optimiser state and inputs: what lies there between two steps."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers(), *inputs]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass(frozen=True)
class Ceilings:
    """The most that a device was seen to do, with the number of CPU threads set at the time.

    Attributes:
        bandwidth: bytes a second of a float32 triad ``a + s·b`` over arrays far larger than any cache: two
            reads and one write counted (not the read that a CPU's write may imply).
        fp32: floating-point operations a second of a square float32 matrix product (no TF32 unless torch is
            told so), 2n³ counted.
        special: float32 exponentials and logarithms a second, half of each, over an array in cache (on a GPU: of
            a size to fill it).
        bf16: as ``fp32``, in bfloat16; 0.0 where not asked for.
    """

    bandwidth: float
    fp32: float
    special: float
    bf16: float = 0.0


def ceilings(device: torch.device, *, bf16: bool = False, repeats: int = 5, quick: bool = False) -> Ceilings:
    """Measure a device's ceilings; the best of ``repeats`` each. ``quick``: tiny arrays, numbers mean nothing."""
    cuda = device.type == "cuda"
    return Ceilings(
        bandwidth=_bandwidth(device, 2**12 if quick else 2**28 if cuda else 2**26, repeats),
        fp32=_products(device, torch.float32, 64 if quick else 8192 if cuda else 2048, repeats),
        special=_special(device, 2**12 if quick else 2**26 if cuda else 2**16, repeats),
        bf16=_products(device, torch.bfloat16, 64 if quick else 8192 if cuda else 2048, repeats) if bf16 else 0.0,
    )


def _bandwidth(device: torch.device, length: int, repeats: int) -> float:
    a, b, out = (torch.ones(length, device=device) for _ in range(3))
    return 3 * 4 * length / _fastest(lambda: torch.add(a, b, alpha=0.5, out=out), repeats)


def _products(device: torch.device, dtype: torch.dtype, side: int, repeats: int) -> float:
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), repeats)


def _special(device: torch.device, length: int, repeats: int) -> float:
    some = torch.rand(length, device=device).add_(1)
    out = torch.empty_like(some)
    times = 1 if device.type == "cuda" else 100  # a call takes microseconds

    def run() -> None:
        for _ in range(times):
            torch.exp(some, out=out)
            torch.log(some, out=out)

    return 2 * times * length / _fastest(run, repeats)


def _fastest(call: Callable[[], Any], repeats: int) -> float:
    return interleaved({"call": call}, repeats=repeats)["call"].low


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected before the clock starts, not while it runs."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
