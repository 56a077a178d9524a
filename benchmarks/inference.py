"""What 2:4 sparsity saves at inference: whole vision transformers, their parts and layers, and files on disk.

    python -m benchmarks.inference [--models NAME ...] [--batches 1 8 32 128] [--repeats N] [--no-compile] [--quick]

Random weights under magnitude masks, random images. On a GPU dense weights run against torch's semi-structured ones,
converted as torch does it and as :mod:`maskllm4v.export.semi_structured` does; on a CPU against the same weights with
zeros. What cannot be measured is listed with the reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import deployed
from benchmarks.deployed import DENSE, FASTER, OURS, RUNTIME, TORCH, ZEROS, Call, Cell, Log, Model, graphed, timed
from benchmarks.measure import Timing, peak_bytes, ratio, synchronize
from benchmarks.results import Row, save
from maskllm4v.export.sparse_speed import tokens_by_layer
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.utils.devices import pick_device

TINY, BASE = "vit_tiny_patch16_224", "vit_base_patch16_224"
MODELS = {"cpu": (TINY, BASE), "cuda": (BASE, "vit_large_patch16_224", "vit_huge_patch14_224")}
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 32, 128)}
COMPILED: dict[str, dict[int, tuple[str, ...]]] = {  # a compilation takes half a minute
    "cpu": {8: (DENSE, ZEROS), 1: (DENSE, ZEROS)},
    "cuda": {128: (DENSE, OURS, TORCH), 1: (DENSE, OURS)},
}
REPEATS = {"cpu": 5, "cuda": 15}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INSIDE = 10  # a graph's calls of one layer or part, so that starting it does not count
MB = 2**20
Sections = dict[str, list[Row]]


class Benchmark:
    """All measurements of one run.

    Args:
        device: where.
        dtype: of weights and images.
        repeats: of everything that is timed.
        log: of what fails.
        quick: tiny models.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, repeats: int, log: Log, quick: bool) -> None:
        self.device, self.dtype, self.repeats, self.log, self.quick = device, dtype, repeats, log, quick
        self.cuda, self.sessions = device.type == "cuda", dict[str, Any]()
        self.compilation = 5.0 if quick else 40.0  # seconds that one is expected to take
        self.precision = next(name for name, type in PRECISIONS.items() if type == dtype)
        titles = ("latency", "parts", "layers", "converted", "size", "failed")
        self.sections: Sections = {title: [] for title in titles} | {"failed": log.rows}

    def build(self, name: str) -> Model | None:
        with self.log.attempt({"model": name}):
            return deployed.build(name, self.device, self.dtype, quick=self.quick)
        return None

    def model(self, name: str, batches: list[int]) -> None:
        """All of one model but what is compiled."""
        model = self.build(name)
        if model is None:
            return
        if not self.cuda:  # the files are the same
            self.sections["size"] += deployed.file_sizes(model, self.log)
            self.sessions = {} if self.quick else deployed.sessions(model, self.log)
        for batch in batches:
            cell: Cell = {"model": name, "batch": batch, "precision": self.precision}
            if self.log.allows(10 if self.cuda and not self.quick else 0, cell):
                with self.log.attempt(cell):
                    self.batch(model, batch, cell)
            self.free()

    def batch(self, model: Model, batch: int, cell: Cell) -> None:
        images = model.images(batch)
        found, rows = deployed.candidates(model, images, self.log, cell, cuda=self.cuda)
        self.sections["converted"] += rows
        memory = {name: self.memory(model, module, images, name, cell) for name, module in found.items()}
        calls: dict[str, Call] = {name: partial(module, images) for name, module in found.items()}
        self.latency(calls, "eager", batch, cell, memory)
        if self.cuda:
            self.latency(self.captured(calls, 1, cell), "graphed", batch, cell, {})
        else:
            inputs = {"images": images.float().numpy()}
            runtimes = {name: partial(session.run, None, inputs) for name, session in self.sessions.items()}
            self.latency(runtimes, RUNTIME, batch, cell, {})
        with self.log.attempt(cell, section="parts"):
            self.pieces(model, found, images, cell)

    def memory(self, model: Model, module: nn.Module, images: Tensor, name: str, cell: Cell) -> Row:
        """MiB of weights, and of all else at its peak; how far outputs are from those of the folded weights."""
        with self.log.attempt(cell, candidate=name, section="memory"):
            module(images)  # libraries' workspaces are allocated once
            row: Row = {
                "weights_mb": deployed.weight_bytes(module) / MB,
                "peak_mb": peak_bytes(lambda: module(images), self.device) / MB,
            }
            return row if name == DENSE else {**row, "error": relative_error(module(images), model.zeros(images))}
        return {}

    def captured(self, calls: dict[str, Call], times: int, cell: Cell) -> dict[str, Call]:
        """As CUDA graphs on a GPU; as they are on a CPU, where one call has to be enough."""
        if not self.cuda:
            return calls
        found: dict[str, Call] = {}
        for name, call in calls.items():
            with self.log.attempt(cell, candidate=name, mode="graphed"):
                found[name] = graphed(call, times)
        return found

    def latency(self, calls: Mapping[str, Call], mode: str, batch: int, cell: Cell, more: Mapping[str, Row]) -> None:
        for name, (own, dense) in timed(calls, self.log, {**cell, "mode": mode}, repeats=self.repeats).items():
            speed = {**statistics(own, dense), "images_s": batch / own.median}
            self.sections["latency"].append({**cell, "candidate": name, "mode": mode, **speed, **more.get(name, {})})

    def pieces(self, model: Model, found: dict[str, nn.Module], images: Tensor, cell: Cell) -> None:
        """Attention and MLP of the first block, and a layer of each shape, apart."""
        linears = prunable_linears(model.dense, exclude=[deployed.HEAD])
        tokens = tokens_by_layer(model.dense, linears, lambda m: m(images))
        for label, name in model.layers().items():
            inputs = self.noise(tokens[name], linears[name].in_features)
            self.piece("layers", "layer", label, name, found, inputs, {**cell, "tokens": tokens[name]})
        for label, name in (("attention", "blocks.0.attn"), ("mlp", "blocks.0.mlp")):
            first = next(layer for layer in linears if layer.startswith(name))
            inputs = self.noise(len(images), tokens[first] // len(images), linears[first].in_features)
            self.piece("parts", "part", label, name, found, inputs, cell)

    def piece(
        self,
        section: str,
        title: str,
        label: str,
        name: str,
        found: dict[str, nn.Module],
        inputs: Tensor,
        cell: Cell,
    ) -> None:
        inside, where = INSIDE if self.cuda else 1, {**cell, title: label}
        calls: dict[str, Call] = {key: partial(module.get_submodule(name), inputs) for key, module in found.items()}
        times = timed(self.captured(calls, inside, where), self.log, where, repeats=self.repeats, inside=inside)
        for key, (own, dense) in times.items():
            self.sections[section].append({**where, "candidate": key, **statistics(own, dense)})

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def compiled(self, name: str, batches: dict[int, tuple[str, ...]]) -> None:
        """``torch.compile`` of one model, on a GPU with CUDA graphs, as far as time allows."""
        model = self.build(name)
        if model is None:
            return
        for batch, names in batches.items():
            cell: Cell = {"model": name, "batch": batch, "precision": self.precision}
            with self.log.attempt(cell, mode="compiled"):
                self.compiled_batch(model, batch, names, cell)
            self.free()

    def compiled_batch(self, model: Model, batch: int, names: tuple[str, ...], cell: Cell) -> None:
        torch.compiler.reset()
        images = model.images(batch)
        found, _ = deployed.candidates(model, images, self.log, cell, cuda=self.cuda)
        calls, took = dict[str, Call](), dict[str, Row]()
        for candidate in names:
            where = {**cell, "candidate": candidate, "mode": "compiled"}
            if candidate not in found or not self.log.allows(1.3 * self.compilation, where):
                continue
            with self.log.attempt(where):
                begin = time.monotonic()
                mode = "reduce-overhead" if self.cuda else "default"
                call = partial(torch.compile(found[candidate], mode=mode, dynamic=False), images)
                for _ in range(3):  # compiles; warms up; captures
                    call()
                synchronize()
                calls[candidate], self.compilation = call, time.monotonic() - begin
                took[candidate] = {"compile_s": self.compilation}
                if candidate != DENSE:
                    took[candidate]["error"] = relative_error(call(), model.zeros(images))
        self.latency(calls, "compiled", batch, cell, took)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def statistics(own: Timing, dense: Timing) -> Row:
    """Milliseconds, and how many times as long the dense candidate took."""
    speedup = ratio(dense, own)
    return {
        "n": own.n,
        "ms": 1e3 * own.median,
        "fastest_ms": 1e3 * own.low,
        "slowest_ms": 1e3 * own.high,
        "speedup": speedup.median,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
    }


NOTES = [
    "speedup: of the dense candidate's time to another's in the same mode and repetition; median, low, high of n.",
    f"{DENSE}: weights without zeros. {TORCH}: to_sparse_semi_structured as it comes. {OURS}: output row-major, the"
    f" fastest algorithm for the number of tokens. {FASTER}: only layers that are faster so. The head is always dense.",
    "eager: called from Python; graphed: a CUDA graph, replayed; compiled: torch.compile, on a GPU with"
    " mode='reduce-overhead'.",
    "weights_mb: MiB of parameters and buffers; peak_mb: the most that a call needs on top. error: of the outputs,"
    " relative to those of the folded weights in dense products of the same type.",
    f"layers, parts: on a GPU in graphs of {INSIDE} calls, so that weights may stay in its cache.",
    "size: bytes of a file, and their ratio to the dense model's of the same type; they are the same for any machine.",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", help="timm's names")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--precision", choices=list(PRECISIONS), help="by default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float, default=400, help="on a GPU: begin nothing long after that")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two repetitions: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    place = "cuda" if device.type == "cuda" else "cpu"
    models = given.models or MODELS[place][: 1 if given.quick else None]
    batches = given.batches or ((1, 2) if given.quick else BATCHES[place])
    repeats = given.repeats or (2 if given.quick else REPEATS[place])
    dtype = PRECISIONS[given.precision or ("bf16" if place == "cuda" else "fp32")]
    log = Log(given.seconds if place == "cuda" else float("inf"))
    benchmark = Benchmark(device, dtype, repeats=repeats, log=log, quick=given.quick)
    write: Callable[[], Any] = partial(save, "inference", benchmark.sections, NOTES, given.out, device=device)
    with torch.no_grad():
        for name in models:
            benchmark.model(name, list(batches))
        if not given.no_compile and not (given.quick and place == "cpu"):
            with contextlib.redirect_stdout(io.StringIO()):
                write()  # compiling may take longer than one has
            wanted = {batch: names for batch, names in COMPILED[place].items() if batch in batches}
            benchmark.compiled(
                BASE if BASE in models else models[0],
                wanted or {batches[0]: (DENSE, OURS if place == "cuda" else ZEROS)},
            )
    write()


if __name__ == "__main__":
    main()
