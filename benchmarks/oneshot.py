"""One-shot pruning of a vision transformer, against the same pipeline with the methods' usual loops.

    python -m benchmarks.oneshot [--model vit_base_patch16_224] [--images 128] [--repeats 3] [--large] [--quick]

Random weights, random images, float32. Both candidates stream the same activations block by block; ``textbook``
sums its Hessian by one product a batch and solves each layer as :mod:`benchmarks.baselines.columns` does.
Candidates run in turn; ``speedup`` is the median over repetitions of the textbook's time to ours.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import maskllm4v
from benchmarks import roofline
from benchmarks.baselines import columns
from benchmarks.measure import Timing, ceilings, interleaved, ratio, synchronize
from benchmarks.results import Row, save
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.oneshot.methods.magnitude import prune_magnitude
from maskllm4v.oneshot.methods.sparsegpt import prune_columns, prune_sparsegpt
from maskllm4v.oneshot.methods.wanda import prune_wanda
from maskllm4v.oneshot.prune import Pruned
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.utils.devices import pick_device

TEXTBOOK, OURS = CANDIDATES = ("textbook", "ours")
METHODS = (("magnitude", False), ("wanda", False), ("sparsegpt", False), ("sparsegpt", True))  # with update?
SHAPES = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # of ViT-B's layers
FACTORS = (1, 2, 4)  # of both widths of the layer
PATTERNS = ("2:4", "4:8", "1:4")
IMAGES, MORE_IMAGES = (32, 64), (32, 64, 128, 256, 512, 1024)
BATCH = 32
CPU = torch.device("cpu")


LAYER_PRUNERS: dict[tuple[str, str], Callable[..., Pruned]] = {
    (TEXTBOOK, "magnitude"): columns.prune_magnitude,
    (TEXTBOOK, "wanda"): columns.prune_wanda,
    (TEXTBOOK, "sparsegpt"): columns.prune_sparsegpt,
    (OURS, "magnitude"): prune_magnitude,
    (OURS, "wanda"): prune_wanda,
    (OURS, "sparsegpt"): prune_sparsegpt,
}
STATISTICS: dict[tuple[str, str], type[Any]] = {
    (TEXTBOOK, "wanda"): InputNorm,
    (TEXTBOOK, "sparsegpt"): columns.PlainHessian,
    (OURS, "wanda"): InputNorm,
    (OURS, "sparsegpt"): Hessian,
}


@dataclass
class Stopwatch:
    """Adds up the time that pruning functions take."""

    seconds: float = 0.0

    def around(self, prune_layer: Callable[..., Pruned]) -> Callable[..., Pruned]:
        def timed(*args: Any, **kwargs: Any) -> Pruned:
            synchronize()
            begin = time.perf_counter()
            result = prune_layer(*args, **kwargs)
            synchronize()
            self.seconds += time.perf_counter() - begin
            return result

        return timed


def register(stopwatch: Stopwatch) -> None:
    """Add all candidates to the library's methods, e.g. as ``"textbook wanda"``, timed by one stopwatch."""
    for (candidate, method), prune_layer in LAYER_PRUNERS.items():
        maskllm4v.register_pruner(
            f"{candidate} {method}",
            statistic=STATISTICS.get((candidate, method)),
            updates=method == "sparsegpt",
            propagate="pruned" if method == "sparsegpt" else "dense",
        )(stopwatch.around(prune_layer))


@dataclass
class Run:
    """Prunes copies of a model and keeps what each took, the copying aside, in seconds."""

    model: Any
    batches: list[Tensor]
    name: str
    update: bool
    stopwatch: Stopwatch
    total: list[float] = field(default_factory=list)
    solving: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        model = copy.deepcopy(self.model)
        self.stopwatch.seconds = 0.0
        synchronize()
        begin = time.perf_counter()
        maskllm4v.prune(
            model, self.name, calibration=self.batches, exclude=[model.get_classifier()], update_weights=self.update
        )
        synchronize()
        self.total.append(time.perf_counter() - begin)
        self.solving.append(self.stopwatch.seconds)


def whole_model(
    model: Any, images: int, methods: tuple[tuple[str, bool], ...], stopwatch: Stopwatch, repeats: int, size: int
) -> list[Row]:
    """A row a method and candidate: seconds in all, of the layers' solving, and of everything else."""
    device = next(model.parameters()).device
    batches = list(torch.randn(images, 3, size, size, device=device).split(BATCH))
    runs = {
        (label(method, update), name): Run(model, batches, f"{name} {method}", update, stopwatch)
        for method, update in methods
        for name in CANDIDATES
    }
    # On a CPU there is nothing to warm up that minutes of work would not hide.
    interleaved({f"{name} {of}": run for (of, name), run in runs.items()}, repeats=repeats, warmup=int(device != CPU))
    times = {key: Timing.of(run.total[-repeats:]) for key, run in runs.items()}
    rows: list[Row] = []
    for (method, name), run in runs.items():
        own, solving = times[method, name], run.solving[-repeats:]
        rest = Timing.of(total - one for total, one in zip(own.samples, solving, strict=True)).median
        rows.append(
            {
                **{"method": method, "images": images, "candidate": name},
                **statistics(own, times[method, TEXTBOOK], 1.0, "s"),
                "solving_s": Timing.of(solving).median,
                "calibration_s": rest,
                "calibration_ms_an_image": 1e3 * rest / images,
            }
        )
    return rows


def tokens(model: Any) -> int:
    """Rows that an image gives to each layer of the blocks."""
    return int(model.pos_embed.shape[1])


def roofline_rows(model: Any, rows: list[Row], count: int, device: torch.device, quick: bool) -> list[Row]:
    """A line a method of ours: what it has to do, and the share of the device's ceilings that it reaches."""
    most = ceilings(device, quick=quick)
    linears = prunable_linears(model, exclude=[model.get_classifier()]).values()
    found: list[Row] = []
    for row in rows:
        if row["candidate"] == OURS:
            time = Timing.of([float(row["s"])])
            line = roofline.pruning_row(linears, str(row["method"]), count, time, most)
            found.append({"method": row["method"], "candidate": OURS, **line, "n": row["n"]})
    return found


def label(method: str, update: bool) -> str:
    return f"{method}, update" if update else method


def statistics(timing: Timing, textbook: Timing, scale: float, unit: str) -> Row:
    """Median, extremes, and how much faster than the textbook."""
    speedup = ratio(textbook, timing)
    return {
        "n": timing.n,
        unit: scale * timing.median,
        f"fastest_{unit}": scale * timing.low,
        f"slowest_{unit}": scale * timing.high,
        "speedup": speedup.median,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
    }


class Layer:
    """A weight ``[out, in]`` of normal noise, and the statistics of correlated inputs of uneven sizes."""

    def __init__(self, out: int, width: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(out + width)
        mixing = torch.eye(width) + 0.7 * torch.randn(width, width, generator=generator) / width**0.5
        inputs = torch.randn(2 * width, width, generator=generator) @ mixing
        inputs *= torch.rand(width, generator=generator) + 0.2
        self.shape = (out, width)
        self.weight = torch.randn(out, width, generator=generator).to(device)
        self.statistics = {key: make(width, device) for key, make in STATISTICS.items()}
        for statistic in self.statistics.values():
            statistic.update(inputs.to(device))

    def solve(self, candidate: str, method: str, update: bool, pattern: NMPattern) -> Pruned:
        """Prune this layer's weight, which stays as it is."""
        prune_layer, statistic = LAYER_PRUNERS[candidate, method], self.statistics.get((candidate, method))
        return prune_layer(self.weight, statistic, pattern, update_weights=update, layer="layer", seed=0)

    def rows(self, repeats: int, pattern: str = "2:4", **labels: str | int) -> list[Row]:
        """A row a method and candidate, in milliseconds."""
        calls = {
            f"{name} {label(method, update)}": partial(self.solve, name, method, update, NMPattern(pattern))
            for method, update in METHODS
            for name in CANDIDATES
        }
        times = interleaved(calls, repeats=repeats)
        found: list[Row] = []
        for of, name in itertools.product(itertools.starmap(label, METHODS), CANDIDATES):
            common: Row = {**labels, "out": self.shape[0], "in": self.shape[1], "pattern": pattern}
            speed = statistics(times[f"{name} {of}"], times[f"{TEXTBOOK} {of}"], 1e3, "ms")
            found.append({**common, "method": of, "candidate": name, **speed})
        return found

    def agreement(self, pattern: str) -> Row:
        """Shares of groups for which both candidates choose alike, updates being found by the same factor."""
        nm = NMPattern(pattern)
        row: Row = {"out": self.shape[0], "in": self.shape[1], "pattern": pattern}
        for method in ("magnitude", "wanda", "sparsegpt"):
            textbook, ours = (self.solve(name, method, False, nm).mask for name in CANDIDATES)
            row[method] = _equal_groups(textbook, ours, nm)
        factor = columns.inverse_factor(self.statistics[OURS, "sparsegpt"].mean)
        textbook = columns.prune_columns_(self.weight.clone(), factor, nm.n, nm.m, update=True)
        ours = prune_columns(self.weight.t().contiguous(), factor, nm)
        return {**row, label("sparsegpt", True): _equal_groups(textbook, ours, nm)}


def _equal_groups(one: Tensor, other: Tensor, pattern: NMPattern) -> float:
    return float((one == other).reshape(-1, pattern.m).all(1).double().mean())


NOTES = [
    "speedup: of the textbook's time to a candidate's of the same repetition; median, lowest and highest of n.",
    "solving_s: in the functions that prune a layer; calibration_s: everything else, namely forward passes, Hessians"
    " or norms, and putting masks in place.",
    "roofline: gflop counted from the layers' shapes (benchmarks/roofline.py); share: of the time measured, what these"
    " take at the measured peak of a float32 product.",
    "agreement: share of equal groups between both candidates; with update given the same factor of the Hessian.",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.oneshot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="any of timm's with images of 224 pixels")
    parser.add_argument("--images", type=int, default=128, help="to calibrate on")
    parser.add_argument("--repeats", type=int, default=3, help="of whole models; layers are repeated twice as often")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--large", action="store_true", help="up to 1024 images on a CPU, too")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one repetition: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    tiny = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10} if given.quick else {}
    torch.manual_seed(0)
    model = timm.create_model(given.model, **tiny).to(device).eval()
    images, repeats, size = (3, 1, 32) if given.quick else (given.images, given.repeats, 224)
    counts = (2, 4) if given.quick else MORE_IMAGES if given.large or device.type == "cuda" else IMAGES
    shapes = {name: (out // 24, width // 24) if given.quick else (out, width) for name, (out, width) in SHAPES.items()}
    stopwatch = Stopwatch()
    register(stopwatch)
    sections: dict[str, list[Row]] = {"layers": [], "width": [], "patterns": [], "agreement": []}
    for name, shape in shapes.items():
        layer = Layer(*shape, device)
        sections["layers"] += layer.rows(2 * repeats, layer=name)
        sections["agreement"] += [layer.agreement(pattern) for pattern in PATTERNS]
    out, width = shapes["proj"]
    for factor in FACTORS:
        sections["width"] += Layer(factor * out, factor * width, device).rows(2 * repeats)
    for pattern in PATTERNS:
        sections["patterns"] += Layer(out, width, device).rows(2 * repeats, pattern)
    for count in counts:
        rows = whole_model(model, count, (("sparsegpt", False),), stopwatch, 1, size)
        sections.setdefault("images", []).extend(rows)
    sections["models"] = whole_model(model, images, METHODS, stopwatch, repeats, size)
    sections["roofline"] = roofline_rows(model, sections["models"], images * tokens(model), device, given.quick)
    save("oneshot", sections, NOTES, given.out, device=device)


if __name__ == "__main__":
    main()
