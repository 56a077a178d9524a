"""Semi-structured weights: what fits and why not, and what becomes of a model, with torch's part of it made up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from folded_vit import linears, pruned, small_vit
from torch import Tensor, nn

import maskllm4v
from maskllm4v.export import semi_structured, sparse_fit
from maskllm4v.export.semi_structured import (
    Conversion,
    SemiStructuredLinear,
    conversion_table,
    to_semi_structured_,
)
from maskllm4v.export.sparse_fit import layer_incompatibility, pick_backend, weight_incompatibility
from maskllm4v.export.sparse_speed import tokens_by_layer
from maskllm4v.utils.errors import ConfigError

# --- what fits ---------------------------------------------------------------------------------------------------


def test_pattern_names_the_first_group_at_fault() -> None:
    weight = pruned(8, 16).weight.detach().clone()
    assert weight_incompatibility(weight) == ""
    weight[3, 8:12] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    weight[5, :4] = 1.0
    assert weight_incompatibility(weight) == "not 2:4: row 3 keeps 3 of inputs 8 to 11"
    weight[3, 8] = -0.0
    assert weight_incompatibility(weight) == "not 2:4: row 5 keeps 4 of inputs 0 to 3"
    weight[5, :2] = 0.0
    assert weight_incompatibility(weight) == ""
    weight[0, :4] = torch.tensor([torch.nan, 1.0, 1.0, 0.0])
    assert "row 0 keeps 3" in weight_incompatibility(weight)


@pytest.mark.parametrize(("pattern", "fits"), [("1:4", True), ("2:4", True), ("3:4", False), ("4:8", False)])
def test_sparser_patterns_fit_too(pattern: str, fits: bool) -> None:
    assert (weight_incompatibility(pruned(32, 64, pattern).weight) == "") == fits


@pytest.mark.parametrize("width", [6, 7, 9])
def test_odd_widths_do_not_fit(width: int) -> None:
    assert weight_incompatibility(torch.zeros(4, width)) == f"its {width} inputs are no multiple of 4"


@pytest.mark.parametrize(
    ("out", "width", "backend", "reason"),
    [
        (16, 16, "cusparselt", ""),
        (24, 16, "cusparselt", "cusparselt needs multiples of 16 outputs and 16 inputs"),
        (16, 24, "cusparselt", "cusparselt needs multiples of 16 outputs and 16 inputs"),
        (32, 64, "cutlass", ""),
        (32, 48, "cutlass", "cutlass needs multiples of 32 outputs and 64 inputs"),
        (32, 64, None, "no way"),
    ],
)
def test_shapes_are_those_of_the_backend(
    out: int, width: int, backend: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_fit, "on_gpu", lambda _: True)
    for dtype in (torch.float16, torch.bfloat16):
        assert layer_incompatibility(pruned(out, width).to(dtype), backend, "no way") == reason


def test_pattern_comes_before_type_and_type_before_device() -> None:
    assert layer_incompatibility(nn.Linear(16, 16), "cusparselt").startswith("not 2:4: row 0 keeps 4")
    assert layer_incompatibility(pruned(16, 16), "cusparselt") == "its weight is float32, not float16 or bfloat16"
    assert layer_incompatibility(pruned(16, 16).half(), "cusparselt") == "its weight is on cpu, not on a GPU"
    model = nn.Sequential(nn.Linear(16, 16))
    maskllm4v.prune(model, "magnitude")
    assert layer_incompatibility(linears(model)["0"], "cusparselt") == "its mask is not folded yet: call fold_ first"


# --- backends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built", "chosen", "obstacles"),
    [
        ((9, 0), True, "cusparselt", {"cutlass": "compute capability 8.x, this GPU has 9.0"}),
        ((8, 6), True, "cusparselt", {}),
        ((8, 0), False, "cutlass", {"cusparselt": "built without cuSPARSELt"}),
        ((9, 0), False, None, {"cusparselt": "built without", "cutlass": "this GPU has 9.0"}),
        ((7, 5), True, None, {"cusparselt": "this GPU has 7.5", "cutlass": "this GPU has 7.5"}),
        (None, True, None, {"cusparselt": "no CUDA device", "cutlass": "no CUDA device"}),
    ],
)
def test_backend_is_what_the_gpu_can(
    capability: tuple[int, int] | None,
    built: bool,
    chosen: str | None,
    obstacles: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse_fit, "capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    found, why = pick_backend(None, None)
    assert found == chosen
    assert (why == "") == (found is not None)
    for name in sparse_fit.BACKENDS:
        if name in obstacles:
            with pytest.raises(ConfigError, match=obstacles[name]):
                pick_backend(name, None)
        else:
            assert pick_backend(name, None) == (name, "")


def test_settings_that_contradict() -> None:
    model = small_vit()
    with pytest.raises(ConfigError, match="backend is 'mkl'; allowed: 'cusparselt', 'cutlass'"):
        to_semi_structured_(model, backend="mkl")
    with pytest.raises(ConfigError, match="faster_only needs an example"):
        to_semi_structured_(model, faster_only=True)
    with pytest.raises(ConfigError, match="matches no layer"):
        to_semi_structured_(model, exclude=["tail"])


# --- conversion, torch's part of it made up ----------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU whose compressed weights are the dense ones times ``factor``; ``ms``: of dense and sparse products."""
    settings: dict[str, Any] = {"factor": 1.0, "ms": (2.0, 1.0), "seen": []}

    def compressed(weight: Tensor, backend: str, **options: Any) -> Tensor:
        settings["seen"].append((backend, options))
        return weight.detach() * settings["factor"]

    monkeypatch.setattr(sparse_fit, "on_gpu", lambda _: True)
    monkeypatch.setattr(sparse_fit, "capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    monkeypatch.setattr(semi_structured, "compress", compressed)
    monkeypatch.setattr(semi_structured, "graphed_ms", lambda calls: settings["ms"][: len(calls)])
    return settings


def test_nothing_changes_where_nothing_fits() -> None:
    model = small_vit().half()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    found = to_semi_structured_(model, example=lambda _: pytest.fail("no layer fits, so nothing is run"))
    assert [line.layer for line in found] == list(linears(model))
    assert not any(line.converted for line in found)
    assert {line.reason for line in found[:-1]} == {"its weight is on cpu, not on a GPU"}
    assert found[-1].reason.startswith("not 2:4: row 0")
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_are_converted_and_excluded_ones_are_not(pretend: dict[str, Any]) -> None:
    model = small_vit().bfloat16()
    images = torch.randn(2, 3, 112, 112, dtype=torch.bfloat16)
    expected = model(images)
    found = to_semi_structured_(model, exclude=["head", "blocks.1"], example=lambda m: m(images))
    converted = {name for name, layer in linears(model).items() if isinstance(layer, SemiStructuredLinear)}
    assert converted == {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {line.layer for line in found} == converted
    assert all((line.converted, line.reason, line.tokens) == (True, "", 2 * 197) for line in found)
    assert all((line.dense_ms, line.sparse_ms) == (2.0, 1.0) for line in found)
    assert pretend["seen"][0] == ("cutlass", {"algorithm": 0, "transposed_output": True})
    assert torch.equal(model(images), expected)
    again = to_semi_structured_(model, exclude=["head"])  # what was left out; the rest is ready
    assert {line.layer.split(".")[1] for line in again if line.converted} == {"1"}


@pytest.mark.parametrize("factor", [1.1, torch.nan], ids=["wrong", "nan"])
def test_wrong_products_stay_dense(factor: float, pretend: dict[str, Any]) -> None:
    model = nn.Sequential(pruned(32, 64)).half()
    pretend["factor"] = factor
    (line,) = to_semi_structured_(model)
    assert not line.converted
    assert line.reason.startswith("wrong product: relative error")
    assert type(model[0]) is nn.Linear


def test_slower_layers_stay_dense_if_asked(pretend: dict[str, Any]) -> None:
    pretend["ms"] = (1.0, 1.25)
    for faster_only in (False, True):
        model = nn.Sequential(pruned(32, 64), pruned(64, 32)).half()
        x = torch.randn(8, 64, dtype=torch.float16)
        first, second = to_semi_structured_(model, example=lambda m, x=x: m[0](x), faster_only=faster_only)
        assert (first.tokens, first.dense_ms, first.sparse_ms) == (8, 1.0, 1.25)
        assert first.converted == (not faster_only)
        assert "32 outputs and 64 inputs" in second.reason
    assert first.reason == "not faster: 1.25 ms, dense 1 ms, at 8 tokens"


def test_a_layer_that_fails_does_not_stop_the_others(pretend: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(pruned(32, 64), nn.ReLU(), pruned(96, 64)).half()

    def failing(weight: Tensor, *_: Any, **__: Any) -> Tensor:
        if len(weight) == 32:
            raise RuntimeError("CUDA error: operation not supported\nmore lines")
        return weight.detach()

    monkeypatch.setattr(semi_structured, "compress", failing)
    first, second = to_semi_structured_(model)
    assert (first.converted, first.reason) == (False, "failed: CUDA error: operation not supported")
    assert second.converted


def test_tokens_are_the_most_seen_at_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    def run(m: Any) -> None:
        m["a"](torch.zeros(2, 3, 4))
        m["a"](input=torch.zeros(1, 4))

    assert tokens_by_layer(model, linears(model), run) == {"a": 6}
    assert not model["a"]._forward_pre_hooks


def test_table_is_aligned() -> None:
    text = conversion_table(
        [Conversion("a.b", (32, 64), True, "", 197, 3, 0.01234, 0.5), Conversion("c", (4, 8), reason="its mask")]
    )
    assert text.splitlines() == [
        "layer  shape  weight  tokens  algorithm  dense ms  sparse ms  reason",
        "a.b    32x64  sparse  197     3          0.01234   0.5",
        "c      4x8    dense   -       -          -         -          its mask",
    ]
