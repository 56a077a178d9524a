"""The mask operation of one layer: forward, backward and regulariser, noise drawn, against the textbook's.

    python -m benchmarks.mask_op [--shape 2304 768] [--backends chunked compiled] [--repeats 15] [--quick]

By default ViT-B's qkv layer. All candidates of a table run in turn; ``speedup`` is the median over repetitions
of the textbook's time to a candidate's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofline
from benchmarks.baselines import textbook
from benchmarks.measure import Timing, interleaved, peak_bytes, ratio, saved_bytes, threads
from benchmarks.results import Row, save
from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.devices import pick_device
from maskllm4v.utils.rng import philox_key

TEXTBOOK = "textbook"
BACKENDS = {"cpu": ("chunked", "compiled"), "cuda": ("triton", "chunked", "compiled")}
SETTINGS = ((1.0, 100.0), (1.3, 100.0))  # (τ, s): at τ = 1 a logarithm is saved; the general form
PATTERNS = ("2:4", "4:8", "1:4")
FACTORS = (1, 2, 4)  # of both widths of the layer
REGULARISATION = 1e-5


@dataclass
class Layer:
    """A frozen weight ``[out, in]``, the logits of its mask in either layout, and a gradient from above."""

    shape: tuple[int, int]
    pattern: NMPattern
    device: torch.device

    def __post_init__(self) -> None:
        groups, candidates = self.shape[0] * self.shape[1] // self.pattern.m, self.pattern.num_candidates
        self.weight = torch.randn(self.shape, device=self.device)
        self.upstream = torch.randn(self.shape, device=self.device)
        self.candidates = self.pattern.candidates(self.device, torch.float32)
        self.logits = (0.2 * torch.randn(candidates, groups, device=self.device)).requires_grad_()
        self.by_group = self.logits.detach().t().contiguous().requires_grad_()  # [groups, K]
        self.energy_gradient = torch.tensor(-REGULARISATION, device=self.device)
        self.draw = 0

    def forward(self, candidate: str, tau: float, scaling: float) -> tuple[Tensor, Tensor]:
        """Masked weight and Σ of its squares, of the textbook or one of the backends, with new noise each time."""
        if candidate == TEXTBOOK:
            return textbook.masked_weight(self.weight, self.by_group, self.candidates, tau=tau, scaling=scaling)
        self.draw += 1
        key = philox_key(0, "gumbel", "layer", self.draw)
        how = {"tau": tau, "scaling": scaling, "key": key, "backend": candidate}
        return masked_weight(self.weight, self.logits, self.candidates, **how)  # type: ignore[arg-type]

    def step(self, candidate: str, tau: float, scaling: float) -> None:
        """Forward and backward; the gradient is dropped."""
        outputs = self.forward(candidate, tau, scaling)
        logits = self.by_group if candidate == TEXTBOOK else self.logits
        torch.autograd.grad(outputs, logits, (self.upstream, self.energy_gradient))

    def saved(self, candidate: str) -> float:
        """Bytes a weight that a whole linear layer keeps for backward beyond what a dense one does."""
        inputs = torch.randn(8, self.shape[1], device=self.device, requires_grad=True)
        known = [inputs, self.weight, self.logits, self.by_group, self.candidates]

        def forward() -> Any:
            masked, energy = self.forward(candidate, *SETTINGS[0])
            return F.linear(inputs, masked), energy

        return saved_bytes(forward, known) / self.weight.numel()

    def peak(self, candidate: str) -> float:
        """The most bytes a weight that forward and backward allocate, results included."""
        return peak_bytes(lambda: self.step(candidate, *SETTINGS[0]), self.device) / self.weight.numel()

    def times(self, backends: list[str], tau: float, scaling: float, repeats: int) -> dict[str, Timing]:
        """Seconds of the textbook and of each backend."""
        torch.compiler.reset()  # a training has one setting; here there are more than Dynamo compiles for
        calls: dict[str, Callable[[], Any]] = {
            name: lambda name=name: self.step(name, tau, scaling)  # type: ignore[misc]
            for name in (TEXTBOOK, *backends)
        }
        return interleaved(calls, repeats=repeats, warmup=2)


def timed(layer: Layer, times: dict[str, Timing], **columns: str | float | int) -> list[Row]:
    """A row a candidate."""
    rows = []
    for name, time in times.items():
        speedup = ratio(times[TEXTBOOK], time)
        rows.append(
            {
                **columns,
                "candidate": name,
                "n": time.n,
                "ms": 1e3 * time.median,
                "fastest_ms": 1e3 * time.low,
                "slowest_ms": 1e3 * time.high,
                "ns_a_weight": 1e9 * time.median / layer.weight.numel(),
                "speedup": speedup.median,
                "speedup_low": speedup.low,
                "speedup_high": speedup.high,
            }
        )
    return rows


NOTES = [
    "speedup: of the textbook's time to a candidate's of the same repetition; median, lowest and highest of n.",
    "saved_bytes: what a linear layer keeps for backward beyond a dense one, a weight; peak_bytes: the most that"
    " forward and backward of the operation allocate at a time, a weight.",
    *roofline.NOTES,
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_op", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[2304, 768], metavar=("OUT", "IN"))
    parser.add_argument("--backends", nargs="+", help="by default all that the device has; quick: the plain one")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, two repetitions: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    known = BACKENDS[device.type]
    backends: list[str] = given.backends or (["chunked"] if given.quick else list(known))
    out, width = (16, 32) if given.quick else given.shape
    repeats = 2 if given.quick else given.repeats
    counts = sorted({1, torch.get_num_threads()}) if device.type == "cpu" else [torch.get_num_threads()]
    sections: dict[str, list[Row]] = {"layer": [], "memory": [], "width": [], "patterns": [], "roofline": []}
    layer = Layer((out, width), NMPattern("2:4"), device)
    for count in counts:
        with threads(count):
            for tau, scaling in SETTINGS:
                times = layer.times(backends, tau, scaling, repeats)
                columns: Row = {"threads": count, "tau": tau, "scaling": scaling}
                sections["layer"] += timed(layer, times, **columns)
                ours = {name: time for name, time in times.items() if name != TEXTBOOK}
                sections["roofline"] += roofline.rows(layer.weight.numel(), ours, tau, device, quick=given.quick)
    for name in (TEXTBOOK, *backends):
        bytes_a_weight: Row = {"saved_bytes": layer.saved(name), "peak_bytes": layer.peak(name)}
        sections["memory"].append({"candidate": name, **bytes_a_weight})
    for factor in FACTORS:
        wide = Layer((factor * out, factor * width), NMPattern("2:4"), device)
        columns = {"out": factor * out, "in": factor * width}
        sections["width"] += timed(wide, wide.times(backends, *SETTINGS[0], repeats), **columns)
    for pattern in PATTERNS:
        other = Layer((out, width), NMPattern(pattern), device)
        made_for = [name for name in backends if name == "chunked" or pattern == "2:4"]
        sections["patterns"] += timed(other, other.times(made_for, *SETTINGS[0], repeats), pattern=pattern)
    save("mask_op", sections, NOTES, given.out, device=device)


if __name__ == "__main__":
    main()
