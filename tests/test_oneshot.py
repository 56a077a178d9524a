"""The one-shot benchmark: its baselines are the methods, and it runs. No speed is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_layers import (
    column_loop,
    every_layer,
    hessian_of,
    inverse_factor,
    keep_best,
    layer_case,
    numbers,
    sparsegpt_mask,
    sparsegpt_original,
)

from benchmarks import oneshot
from benchmarks.baselines import columns
from maskllm4v.oneshot import prune as pruners
from maskllm4v.utils.io import read_json


@every_layer
def test_baselines_without_updates(out: int, width: int, pattern: str) -> None:
    n, m = numbers(pattern)
    weight, inputs = layer_case(out, width)
    weight, inputs, before = weight.double(), inputs.double(), weight.double()
    norms, hessian = inputs.norm(dim=0), 2 / len(inputs) * inputs.t() @ inputs
    assert torch.equal(columns.magnitude(weight, n, m), keep_best(weight.abs(), n, m))
    assert torch.equal(columns.wanda(weight, norms, n, m), keep_best(weight.abs() * norms, n, m))
    assert torch.equal(columns.sparsegpt_(weight, hessian, n, m, False), sparsegpt_mask(weight, hessian, n, m))
    assert torch.equal(weight, before)


@every_layer
@pytest.mark.parametrize("dead", [0, 5])
def test_sparsegpt_baseline_with_updates(out: int, width: int, pattern: str, dead: int) -> None:
    weight, inputs = layer_case(out, width, dead=dead)
    hessian = hessian_of(inputs, torch.float64).mean
    before, updated = hessian.clone(), weight.double()
    mask = columns.sparsegpt_(updated, hessian, *numbers(pattern), True)
    expected, weights = sparsegpt_original(weight, hessian, *numbers(pattern))
    assert torch.equal(mask, expected)
    torch.testing.assert_close(updated, weights, rtol=0, atol=1e-10)
    assert torch.equal(hessian, before)


def test_baseline_given_the_factor() -> None:
    weight, inputs = layer_case(40, 260)
    weight, factor = weight.double(), inverse_factor(hessian_of(inputs).mean)[0]
    expected, weights = column_loop(weight, factor, 2, 4)
    assert torch.equal(columns.prune_columns_(weight, factor, 2, 4, True), expected)
    torch.testing.assert_close(weight, weights, rtol=0, atol=1e-10)


def test_plain_hessian() -> None:
    plain, batches = columns.PlainHessian(600, torch.device("cpu")), [torch.randn(count, 600) for count in (9, 2)]
    for rows in batches:
        plain.update(rows)
    torch.testing.assert_close(plain.mean, hessian_of(torch.cat(batches)).mean, rtol=0, atol=1e-5)


def test_oneshot_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruners, "_METHODS", dict(pruners._METHODS))  # what it registers is gone afterwards
    oneshot.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "x.json")])
    sections = read_json(tmp_path / "x.json")["sections"]
    assert set(sections) == {"agreement", "images", "layers", "models", "patterns", "roofline", "width"}
    methods = ["magnitude", "wanda", "sparsegpt", "sparsegpt, update"]
    pairs = [(method, candidate) for method in methods for candidate in ("textbook", "ours")]
    assert [(row["method"], row["candidate"]) for row in sections["models"]] == pairs
    for row in sections["models"]:
        assert row["s"] == pytest.approx(row["solving_s"] + row["calibration_s"], rel=1e-2)
        assert (row["candidate"] == "textbook") <= (row["speedup"] == 1)
        assert row["solving_s"] > 0
    assert [row["layer"] for row in sections["layers"][:: len(pairs)]] == ["qkv", "proj", "fc1", "fc2"]
    assert [row["in"] for row in sections["width"][:: len(pairs)]] == [32, 64, 128]
    assert [row["images"] for row in sections["images"]] == [2, 2, 4, 4]
    assert len(sections["agreement"]) == 12
    for row in sections["agreement"]:
        assert all(row[method] >= 0.999 for method in methods)
