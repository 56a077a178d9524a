"""The TensorRT example: what it reads in logs, written here after NVIDIA's documentation, and its command lines."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT

SCRIPT = ROOT / "scripts" / "tensorrt_engine.py"
LOG = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v101401] # trtexec --onnx=m.onnx --sparsity=enable --stronglyTyped --verbose
[05/01/2026-10:00:00] [I] [TRT] (Sparsity) Found 1 layer(s) eligible to use sparse tactics: an earlier pass
[05/01/2026-10:00:00] [I] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: an earlier pass
[05/01/2026-10:00:01] [V] [TRT] blocks.0.mlp.fc1 Set Tactic Name: sm90_sparse_gemm Tactic: 0x1 Time: 0.01
[05/01/2026-10:00:02] [I] [TRT] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: blocks.0.attn.qkv, \
blocks.0.mlp.fc1 + PWN(node_gelu, {node_mul, node_add[0, 1]}), blocks.0.mlp.fc2
[05/01/2026-10:00:02] [I] [TRT] (Sparsity) Chose 2 layer(s) using sparse tactics: \
blocks.0.mlp.fc1 + PWN(node_gelu, {node_mul, node_add[0, 1]}), blocks.0.mlp.fc2
[05/01/2026-10:00:03] [I] Engine built in 31.2 sec.
"""
TENSORRT_8 = """\
[03/23/2021-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1, conv2, conv3
[03/23/2021-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3
"""


@pytest.fixture(scope="module")
def script() -> Any:
    spec = spec_from_file_location("tensorrt_engine", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_last_choice_of_kernels_counts(script: Any) -> None:
    found = script.read_log(LOG)
    fused = "blocks.0.mlp.fc1 + PWN(node_gelu, {node_mul, node_add[0, 1]})"
    assert found.eligible == script.Layers(3, ("blocks.0.attn.qkv", fused, "blocks.0.mlp.fc2"))
    assert found.chosen == script.Layers(2, (fused, "blocks.0.mlp.fc2"))
    assert script.table(found).splitlines() == [
        f"{'layer':{len(fused)}}  kernel",
        f"{'blocks.0.attn.qkv':{len(fused)}}  dense",
        f"{fused}  sparse",
        f"{'blocks.0.mlp.fc2':{len(fused)}}  sparse",
        "2 of 3 eligible layers use sparse kernels",
    ]


def test_logs_of_tensorrt_8(script: Any) -> None:
    found = script.read_log(TENSORRT_8)
    assert found.eligible == script.Layers(3, ("conv1", "conv2", "conv3"))
    assert found.chosen == script.Layers(2, ("conv2", "conv3"))
    nothing = script.read_log(TENSORRT_8.replace("conv2, conv3", "").replace("conv1, ", ""))
    assert (nothing.eligible.count, nothing.chosen.count) == (0, 0)


def test_logs_without_names(script: Any) -> None:
    log = re.sub("sparse tactics: .*", "sparse tactics", LOG)
    found = script.read_log(log)
    assert (found.eligible, found.chosen) == (script.Layers(3, ()), script.Layers(2, ()))
    assert script.table(found) == "2 of 3 eligible layers use sparse kernels"


def test_other_logs_say_nothing(script: Any) -> None:
    assert script.read_log("") is None
    assert script.read_log("\n".join(line for line in LOG.splitlines() if "(Sparsity)" not in line)) is None


def test_command_line_of_trtexec(script: Any) -> None:
    inputs = {"sample": (-1, 4, 32, 32), "timestep": (-1,)}
    three = script.shapes(inputs, (1, 8, 16))
    assert script.command("trtexec", Path("m.onnx"), Path("m.engine"), three)[1:] == [
        *("--onnx=m.onnx", "--saveEngine=m.engine", "--sparsity=enable", "--stronglyTyped", "--verbose"),
        *("--profilingVerbosity=detailed", "--skipInference"),
        "--minShapes=sample:1x4x32x32,timestep:1",
        "--optShapes=sample:8x4x32x32,timestep:8",
        "--maxShapes=sample:16x4x32x32,timestep:16",
    ]


def test_reads_a_log_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "build.log").write_text(TENSORRT_8)
    line = [sys.executable, str(SCRIPT), "--log", str(tmp_path / "build.log")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 of 3 eligible layers use sparse kernels"
    assert (
        "has not been run on a GPU"
        in subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    )


def test_runs_trtexec(tmp_path: Path) -> None:
    """A stand-in that writes a log and an engine."""
    onnx = pytest.importorskip("onnx")
    shape = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [shape("x", 1, ["batch", 4])], [shape("y", 1, ["batch", 4])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    (tmp_path / "log").write_text(LOG)
    program = tmp_path / "trtexec"
    program.write_text(f'#!/bin/sh\necho engine > {tmp_path}/m.engine; echo "$@"; cat {tmp_path}/log\n')
    program.chmod(0o755)
    line = [sys.executable, str(SCRIPT), str(tmp_path / "m.onnx"), "--trtexec", str(program), "--batch", "1", "2", "3"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "--minShapes=x:1x4 --optShapes=x:2x4 --maxShapes=x:3x4" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 of 3 eligible layers use sparse kernels"
    program.write_text("#!/bin/sh\necho no GPU; exit 3\n")
    failed = subprocess.run(line, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "no GPU\n\ntrtexec failed with status 3" in failed.stderr
