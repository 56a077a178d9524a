"""A TensorRT engine from an ONNX file of ours, and which of its layers run on sparse tensor cores: an example.

    python scripts/tensorrt_engine.py MODEL.onnx [ENGINE] [--batch MIN OPT MAX]              # TensorRT's Python API
    python scripts/tensorrt_engine.py MODEL.onnx [ENGINE] [--batch MIN OPT MAX] --trtexec    # its command-line tool
    python scripts/tensorrt_engine.py --log BUILD.log                                        # a log of either

It has not been run on a GPU so far. It is written after NVIDIA's documentation of TensorRT 10 and 11, and the part that
reads logs is tested on a log written after that documentation, not on one that TensorRT wrote.

The network is strongly typed: a file in fp16 is computed in fp16, one in fp32 in fp32 (and TF32). TensorRT looks for
2:4 itself: a layer is eligible if of every four weights along the axis that is summed over at least two are zero. It
then times sparse and dense kernels at the middle batch size, and takes the faster, which need not be the sparse one.
Layers are called after the ONNX nodes that they were made of, and so after the model's linear layers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ELIGIBLE = (
    r"Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics(?:: *(?P<layers>.*))?",
    r"Layers eligible for sparse math:(?P<layers>.*)",  # TensorRT 8
)
CHOSEN = (
    r"Chose (?P<count>\d+) layer\(s\) using sparse tactics(?:: *(?P<layers>.*))?",
    r"TRT inference plan picked sparse implementation for layers:(?P<layers>.*)",
)
Shapes = dict[str, tuple[tuple[int, ...], ...]]  # smallest, best and largest by input


@dataclass(frozen=True)
class Layers:
    """How many layers a log speaks of; their names where it says them."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Sparsity:
    """The layers whose weights are 2:4, and those of them that run on sparse tensor cores."""

    eligible: Layers
    chosen: Layers


def read_log(log: str) -> Sparsity | None:
    """What a verbose build log says of sparsity; None if it says nothing.

    TensorRT may choose kernels several times in a build. The last time is that of the engine.
    """
    eligible, chosen = _last(ELIGIBLE, log), _last(CHOSEN, log)
    return None if eligible is None or chosen is None else Sparsity(eligible, chosen)


def _last(patterns: tuple[str, ...], log: str) -> Layers | None:
    found = [m for pattern in patterns for m in re.finditer(rf"\(Sparsity\) {pattern}$", log, re.MULTILINE)]
    if not found:
        return None
    match = max(found, key=re.Match.start).groupdict()
    names = tuple(split_names(match["layers"] or ""))
    return Layers(int(match.get("count", len(names))), names)


def split_names(text: str) -> list[str]:
    """Names of layers in a list: commas inside brackets belong to names, such as ``PWN(PWN(a, b), c)``."""
    names, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += letter
    return [name.strip() for name in names if name.strip()]


def table(found: Sparsity) -> str:
    """One line a layer, and the counts."""
    names = [*found.eligible.names, *(name for name in found.chosen.names if name not in found.eligible.names)]
    width = max([len("layer"), *map(len, names)])
    lines = [f"{name:{width}}  {'sparse' if name in found.chosen.names else 'dense'}" for name in names]
    total = f"{found.chosen.count} of {found.eligible.count} eligible layers use sparse kernels"
    return "\n".join([*([f"{'layer':{width}}  kernel", *lines] if names else []), total])


def build(model: Path, engine: Path, batch: tuple[int, int, int]) -> str:
    """Build with the Python API; returns the log."""
    try:
        import tensorrt as trt
    except ImportError as error:
        sys.exit(f"TensorRT is not installed (pip install tensorrt), or say --trtexec: {error}")

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity not in (trt.ILogger.Severity.INFO, trt.ILogger.Severity.VERBOSE):
                print(message, file=sys.stderr)

    log = Log()
    builder = trt.Builder(log)
    # TensorRT 11 ignores it: all its networks are strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        sys.exit(f"{model}: " + "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    for name, three in shapes(inputs, batch).items():
        profile.set_shape(name, *three)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit(f"{model}: TensorRT built no engine")
    engine.write_bytes(plan)
    return "\n".join(log.lines)


def command(program: str, model: Path, engine: Path, three: Shapes) -> list[str]:
    """``trtexec``'s command line."""
    spans = {
        which: ",".join(f"{name}:{'x'.join(map(str, found[place]))}" for name, found in three.items())
        for place, which in enumerate(("min", "opt", "max"))
    }
    return [
        *(program, f"--onnx={model}", f"--saveEngine={engine}", "--sparsity=enable", "--stronglyTyped", "--verbose"),
        *("--profilingVerbosity=detailed", "--skipInference"),
        *(f"--{which}Shapes={span}" for which, span in spans.items()),
    ]


def run_trtexec(program: str, model: Path, engine: Path, batch: tuple[int, int, int]) -> str:
    """Build with ``trtexec``; returns the log."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    inputs = {value.name: tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim) for value in graph.input}
    line = command(program, model, engine, shapes(inputs, batch))
    print(" ".join(line))
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        sys.exit(f"cannot run {program}: {error.strerror}")
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\ntrtexec failed with status {done.returncode}")
    return done.stdout


def shapes(inputs: dict[str, tuple[int, ...]], batch: tuple[int, int, int]) -> Shapes:
    """Each input's shape at the three batch sizes; its first dimension is the batch."""
    return {name: tuple((size, *shape[1:]) for size in batch) for name, shape in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL.onnx")
    parser.add_argument("engine", type=Path, nargs="?", metavar="ENGINE", help="default MODEL.engine")
    parser.add_argument("--batch", type=int, nargs=3, default=(1, 32, 128), metavar=("MIN", "OPT", "MAX"))
    parser.add_argument("--trtexec", nargs="?", const="trtexec", metavar="PROGRAM", help="build with NVIDIA's tool")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of a build that was done before")
    a = parser.parse_args()
    if (a.model is None) == (a.log is None):
        parser.error("say either MODEL.onnx or --log FILE")
    if not (found := a.log or a.model).exists():
        parser.error(f"{found} is missing")
    if a.log:
        log = a.log.read_text(encoding="utf-8", errors="replace")
    else:
        engine = a.engine or a.model.with_suffix(".engine")
        log = run_trtexec(a.trtexec, a.model, engine, a.batch) if a.trtexec else build(a.model, engine, a.batch)
        print(f"{engine}: {engine.stat().st_size:,} bytes")
    found = read_log(log)
    print("the log says nothing about sparsity" if found is None else table(found))


if __name__ == "__main__":
    main()
