"""The inference benchmark: what it compares, and that no failure ends it. No speed is asserted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import deployed, inference
from benchmarks.deployed import DENSE, FASTER, OURS, TORCH, ZEROS, Log
from benchmarks.measure import Timing
from maskllm4v.export.semi_structured import Conversion, SemiStructuredLinear
from maskllm4v.utils.io import read_json

CPU = torch.device("cpu")
TINY = inference.TINY


@pytest.fixture(scope="module")
def model() -> deployed.Model:
    return deployed.build(TINY, CPU, torch.float32, quick=True)


def failing() -> None:
    raise RuntimeError("no kernel\nat all")


def test_candidates_share_weights_and_masks(model: deployed.Model) -> None:
    assert len(model.masks) == 4
    for name, mask in model.masks.items():
        weight = model.dense.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(model.zeros.get_submodule(name).weight, weight * mask)
        assert int(mask.sum()) == mask.numel() // 2
    assert torch.equal(model.zeros.head.weight, model.dense.head.weight)
    assert {type(layer) for layer in model.zeros.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
    found, rows = deployed.candidates(model, model.images(1), Log(1e9), {}, cuda=False)
    assert (found, rows) == ({DENSE: model.dense, ZEROS: model.zeros}, [])
    assert list(model.layers()) == ["attn.qkv 192x64", "attn.proj 64x64", "mlp.fc1 256x64", "mlp.fc2 64x256"]


def test_failures_are_noted_and_the_rest_goes_on() -> None:
    log = Log(1e9)
    times = deployed.timed({DENSE: lambda: None, "x": failing}, log, {"model": "m"}, repeats=2)
    assert list(times) == [DENSE]
    assert log.rows == [{"model": "m", "candidate": "x", "reason": "RuntimeError: no kernel"}]
    assert deployed.timed({DENSE: failing, "x": lambda: None}, log, {}, repeats=2) == {}
    with pytest.raises(KeyboardInterrupt), log.attempt({}):
        raise KeyboardInterrupt
    assert len(log.rows) == 2


def test_nothing_is_begun_without_time() -> None:
    log = Log(5.0)
    assert log.allows(1.0, {"batch": 1})
    assert not log.allows(10.0, {"batch": 2})
    assert log.rows == [{"batch": 2, "reason": "no time left"}]


def test_work_inside_a_call_is_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {DENSE: Timing.of([10.0, 20.0]), "x": Timing.of([5.0, 5.0])}
    monkeypatch.setattr(deployed, "interleaved", lambda calls, repeats: measured)
    times = deployed.timed(dict.fromkeys(measured, lambda: None), Log(1e9), {}, repeats=2, inside=10)
    row = inference.statistics(*times["x"])
    assert (row["ms"], row["speedup"], row["speedup_low"], row["speedup_high"]) == (500.0, 3.0, 2.0, 4.0)


def test_bytes_of_weights_are_those_of_what_they_are_packed_into() -> None:
    layer, tied = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
    tied.weight = layer.weight
    both = nn.Sequential(layer, tied)
    assert deployed.weight_bytes(both) == 4 * (32 + 4)
    layer.weight.packed = torch.zeros(18, dtype=torch.float16)  # type: ignore[attr-defined]
    assert deployed.weight_bytes(both) == 2 * 18 + 4 * 4


def test_conversions_are_summed_up_by_kind() -> None:
    lines = [
        Conversion("blocks.0.mlp.fc1", (64, 32), True, "", 5, 3, 0.2, 0.1),
        Conversion("blocks.1.mlp.fc1", (64, 32), False, "wrong product", 5),
        Conversion("blocks.0.mlp.fc2", (32, 64), False, "not 2:4"),
    ]
    first, second = deployed.conversion_rows(lines)
    assert first == {
        **{"layers": "mlp.fc1 64x32", "count": 2, "converted": 1, "reason": "wrong product"},
        **{"algorithm": 3, "dense_ms": 0.2, "sparse_ms": 0.1},
    }
    assert second == {"layers": "mlp.fc2 32x64", "count": 1, "converted": 0, "reason": "not 2:4"}


def test_sizes_of_files(model: deployed.Model) -> None:
    log = Log(1e9)
    rows = {(row["format"], row.get("dtype")): row for row in deployed.file_sizes(model, log)}
    assert not log.rows
    weights = sum(mask.numel() for mask in model.masks.values())
    for dtype, width in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        saved = int(rows["dense", dtype]["bytes"]) - int(rows["packed", dtype]["bytes"])
        assert saved == pytest.approx(weights * width / 2 - weights / 4 * 3 / 8, rel=0.1)
    assert int(rows["mask", None]["bytes"]) < int(rows["packed", "fp16"]["bytes"])


def test_a_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inference.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "x.json")])
    found = read_json(tmp_path / "x.json")["sections"]
    assert found["failed"] == []
    assert [(row["batch"], row["candidate"], row["mode"]) for row in found["latency"]] == [
        (batch, name, "eager") for batch in (1, 2) for name in (DENSE, ZEROS)
    ]
    for row in found["latency"]:
        assert (row["model"], row["n"]) == (TINY, 2)
        assert row["images_s"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=1e-2)
        assert min(row["weights_mb"], row["peak_mb"]) > 0
        assert row.get("error", 0) == 0
        assert (row["speedup"] == 1) or row["candidate"] != DENSE
    assert [row["part"] for row in found["parts"]] == 2 * ["attention", "attention", "mlp", "mlp"]
    assert {row["tokens"] for row in found["layers"]} == {5, 10}
    assert len(found["layers"]) == 2 * 4 * 2
    assert "speedup" in capsys.readouterr().out


def test_a_run_on_a_gpu_as_far_as_a_cpu_can_pretend(
    tmp_path: Path, model: deployed.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ways to run a model; one candidate cannot be made, one cannot be captured, one cannot be compiled."""

    def converted(zeros: nn.Module, images: torch.Tensor, *, faster_only: bool) -> tuple[nn.Module, list[Conversion]]:
        return zeros, [Conversion("blocks.0.mlp.fc1", (256, 64), not faster_only, "slow" if faster_only else "")]

    def graphed(call: Any, times: int) -> Any:  # no whole models but the dense one
        if isinstance(call, partial) and call.func is not model.dense and times == 1:
            failing()
        return lambda: [call() for _ in range(times)]

    monkeypatch.setattr(deployed, "by_us", converted)
    monkeypatch.setattr(deployed, "by_torch", lambda _: failing())
    monkeypatch.setattr(deployed, "build", lambda *_, **__: model)
    monkeypatch.setattr(inference, "graphed", graphed)
    monkeypatch.setattr(torch, "compile", lambda m, **_: m if m is model.dense else failing())
    log = Log(1e9)
    benchmark = inference.Benchmark(CPU, torch.float32, repeats=2, log=log, quick=True)
    benchmark.cuda = True
    with torch.no_grad():
        benchmark.model(TINY, [1])
        benchmark.compiled(TINY, {1: (DENSE, OURS, TORCH)})
    rows = benchmark.sections["latency"]
    assert [(row["candidate"], row["mode"]) for row in rows] == [
        *((name, "eager") for name in (DENSE, OURS, FASTER)),
        *((DENSE, mode) for mode in ("graphed", "compiled")),
    ]
    assert [row["converted"] for row in benchmark.sections["converted"]] == [1, 0]
    assert {row["candidate"] for row in benchmark.sections["parts"]} == {DENSE, OURS, FASTER}
    failed = [(row["candidate"], row.get("mode", "")) for row in log.rows]
    assert failed == [
        *((TORCH, ""), (OURS, "graphed"), (FASTER, "graphed")),
        *((TORCH, ""), (OURS, "compiled")),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore")  # torch's own, on prototypes
def test_candidates_on_a_gpu() -> None:
    model, log = deployed.build(TINY, torch.device("cuda"), torch.bfloat16, quick=True), Log(1e9)
    with torch.no_grad():
        found, rows = deployed.candidates(model, model.images(2), log, {"batch": 2}, cuda=True)
    assert (list(found), log.rows) == ([DENSE, TORCH, OURS, FASTER], [])
    assert sum(isinstance(layer, SemiStructuredLinear) for layer in found[OURS].modules()) == 4
    assert [row["converted"] for row in rows[:4]] == [1] * 4
    assert deployed.weight_bytes(found[OURS]) < deployed.weight_bytes(found[DENSE])
