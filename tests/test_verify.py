"""The N:M check of single weights, against an oracle that loops over all groups; and what has to hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_files import random_mask
from torch import Tensor

from maskllm4v.export.verify import LayerCheck, Weight, check_weight, hardly_sparse, passes, verify_file
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError

PATTERNS = ("1:2", "2:4", "1:4", "2:8", "4:8", "3:5", "7:8", "1:16")
P24 = NMPattern(2, 4)


def check(values: Tensor, pattern: NMPattern = P24, told: bool = False, **facts: object) -> LayerCheck:
    return check_weight(replace(Weight("fc", values), **facts), pattern, told)


def first_fault(rows: Sequence[Sequence[float]], pattern: NMPattern, exactly: bool) -> tuple[int, int, int] | None:
    """The oracle: row, group, count."""
    for number, row in enumerate(rows):
        for group in range(len(row) // pattern.m):
            count = 0
            for value in row[group * pattern.m : (group + 1) * pattern.m]:
                count += 0 if value == 0 else 1
            if count > pattern.n or (exactly and count < pattern.n):
                return number, group, count
    return None


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, NMPattern]:
    """Of zeros, ones and others: often N:M sparse along one axis, sometimes with one value too many."""
    pattern = NMPattern(draw(st.sampled_from(PATTERNS)))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        rows *= pattern.m
    torch.manual_seed(draw(st.integers(0, 999)))
    mask = random_mask(rows, groups * pattern.m, pattern.n, pattern.m)
    kind = draw(st.sampled_from(["pattern", "flipped", "sparser", "random"]))
    if kind == "flipped":
        place = draw(st.integers(0, mask.numel() - 1))
        mask.view(-1)[place] ^= True
    elif kind == "sparser":
        mask &= torch.rand(mask.shape) < 0.7
    elif kind == "random":
        mask = torch.rand(mask.shape) < draw(st.sampled_from([0.05, 0.5, 0.8]))
    values = torch.randn(mask.shape).where(torch.rand(mask.shape) < 0.9, math.nan)
    return values.where(mask, torch.tensor(draw(st.sampled_from([0.0, -0.0])))), pattern


@settings(max_examples=150, deadline=None)
@given(matrices(), st.booleans(), st.sampled_from([0, 1]))
def test_as_the_oracle_finds(drawn: tuple[Tensor, NMPattern], exactly: bool, k_axis: int) -> None:
    values, pattern = drawn
    rows = (values != 0).float() if exactly else values
    found = check(rows if k_axis == 1 else rows.t().contiguous(), pattern, mask=exactly, required=True, k_axis=k_axis)
    fault = first_fault(rows.tolist(), pattern, exactly)
    assert found.verdict == ("holds" if fault is None else "violated")
    assert found.density == pytest.approx(sum(v != 0 for row in rows.tolist() for v in row) / rows.numel(), abs=1e-12)
    if fault is None:
        assert (found.axis, found.violation) == ("in", None)
        return
    row, group, count = fault
    line, kind = ("column", "row")[k_axis], ("non-zero", "kept")[exactly]
    said = f"{line} {row}, group {group}: {count} of {pattern.m} {kind}"
    across = rows.shape[0] % pattern.m == 0 and first_fault(rows.t().tolist(), pattern, exactly) is None
    assert found.axis == ("out" if across else None)
    assert found.violation == (f"{said}; holds along out instead of in (transposed?)" if across else said)


@settings(max_examples=50, deadline=None)
@given(matrices())
def test_what_the_pattern_says_of_masks(drawn: tuple[Tensor, NMPattern]) -> None:
    mask, pattern = drawn[0] != 0, drawn[1]
    assert (check(mask, pattern, mask=True).verdict == "holds") == pattern.is_valid(mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_any_type_of_numbers(dtype: torch.dtype) -> None:
    values = random_mask(3, 8, 2, 4).to(dtype)
    assert check(values).verdict == "holds"
    values = torch.tensor([[1, 0, 0, 1, 1, 1, 0, 1]]).to(dtype)
    assert check(values).violation == "row 0, group 1: 3 of 4 non-zero"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.2e-38])
def test_whatever_is_not_zero_counts(value: float) -> None:
    assert check(torch.tensor([[1.0, 0.0, 2.0, value]])).violation == "row 0, group 0: 3 of 4 non-zero"
    assert check(torch.tensor([[1.0, 0.0, -0.0, value]])).verdict == "holds"


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="an older torch")
def test_types_without_comparison() -> None:
    with pytest.raises(CheckpointError, match=r"layer 'fc': torch cannot find zeros among torch.float4"):
        check(torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))


def test_fewer_is_enough_for_weights_but_not_for_masks() -> None:
    fewer = torch.tensor([[True, True, False, False], [False, True, False, False]])
    assert check(fewer.float()).verdict == "holds"
    assert check(fewer, mask=True).violation == "row 1, group 0: 1 of 4 kept"


def test_masks_are_zeros_and_ones() -> None:
    halves = random_mask(4, 8, 2, 4) * 0.5
    assert check(halves, mask=True).violation == "a mask with values other than 0 and 1"
    assert check(halves).verdict == "holds"


def test_transposed_weight() -> None:
    torch.manual_seed(0)
    kernel = (random_mask(12, 16, 2, 4) * torch.randn(12, 16)).t()
    found = check(kernel)
    assert (found.shape, found.verdict, found.axis, found.density) == ((16, 12), "violated", "out", 0.5)
    assert found.violation is not None
    assert found.violation.endswith(" of 4 non-zero; holds along out instead of in (transposed?)")
    assert check(kernel, k_axis=0).verdict == "holds"
    graph = check(kernel, node="MatMul_3")
    assert (graph.verdict, graph.axis) == ("violated", "N")
    assert graph.violation is not None
    assert graph.violation.endswith("; holds along N instead of K (transposed?)")
    graph = check(kernel, node="MatMul_3", k_axis=0)
    assert (graph.verdict, graph.axis, graph.violation) == ("holds", "K", None)


def test_odd_width() -> None:
    found = check(torch.eye(8)[:, :6])
    assert found.violation == "its 6 input features are no multiple of 4; holds along out instead of in (transposed?)"
    assert check(torch.eye(6)).violation == "its 6 input features are no multiple of 4"
    assert check(torch.eye(6), NMPattern(1, 3)).verdict == "holds"


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_nothing_in_it(shape: tuple[int, int]) -> None:
    found = check(torch.zeros(shape))
    assert (found.verdict, found.axis, found.density, found.violation) == ("violated", None, 0, "it has no values")


def test_one_row() -> None:
    assert check(torch.tensor([[1.0, 0.0, 2.0, 0.0]])).verdict == "holds"
    assert (
        check(torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]])).violation == "row 0, group 1: 3 of 4 non-zero"
    )


@pytest.mark.parametrize(
    ("pattern", "limit"), [("2:4", 0.9), ("1:4", 0.9), ("4:8", 0.9), ("7:8", 0.9375), ("15:16", 0.96875)]
)
def test_dense_is_what_is_hardly_zero_anywhere(pattern: str, limit: float) -> None:
    assert hardly_sparse(limit + 1e-6, NMPattern(pattern))
    assert not hardly_sparse(limit, NMPattern(pattern))


def test_dense_layers_have_to_hold_if_required() -> None:
    full, most = torch.ones(8, 16), torch.ones(8, 16)
    most[:, ::8] = 0  # one of 8
    assert [check(w).verdict for w in (full, most)] == ["dense", "violated"]
    assert [check(w, told=True).verdict for w in (full, most)] == ["dense", "dense"]
    assert [check(w, told=True, required=True).verdict for w in (full, most)] == ["violated", "violated"]
    assert check(full).violation == "row 0, group 0: 4 of 4 non-zero"


def test_one_broken_group_of_many_is_no_dense_layer() -> None:
    weight = random_mask(64, 64, 7, 8).float()
    weight[63, 63] = weight[63, 56:63] = 1
    assert check(weight, NMPattern(7, 8)).violation == "row 63, group 7: 8 of 8 non-zero"
    assert check(weight, NMPattern(7, 8)).verdict == "violated"


def test_what_passes() -> None:
    sparse, full, zero = check(random_mask(2, 8, 2, 4)), check(torch.ones(2, 8)), check(torch.zeros(2, 8))
    broken = check(torch.ones(2, 8), required=True)
    assert passes([sparse])
    assert passes([sparse, full, zero])
    assert not passes([])
    assert not passes([full])
    assert not passes([full, zero])  # such layers are zero before training
    assert passes([full, check(torch.zeros(2, 8), required=True)])
    assert not passes([sparse, broken])


def graph(path: Path, first: Tensor, second: Tensor) -> dict[str, LayerCheck]:
    """What is found in somebody's graph of ``x @ first`` and a ``Gemm`` by the transposed second."""
    helper = pytest.importorskip("onnx").helper
    ends = [helper.make_tensor_value_info(name, 1, [2, size]) for name, size in (("x", len(first)), ("y", len(second)))]
    nodes = [
        helper.make_node("MatMul", ["x", "val_3"], ["h"], "/fc1/MatMul"),
        helper.make_node("Gemm", ["h", "fc2.weight"], ["y"], "/fc2/Gemm", transB=1),
    ]
    constants = [
        helper.make_tensor(name, 1, weight.shape, weight.flatten().tolist())
        for name, weight in (("val_3", first), ("fc2.weight", second))
    ]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    path.write_bytes(helper.make_model(made).SerializeToString())
    return {check.layer: check for check in verify_file(path)}


@pytest.mark.parametrize("name", ["m.onnx", "m.bin"])
def test_graphs_of_others(name: str, tmp_path: Path) -> None:
    """Groups lie along the axis that is summed over, however the weight is stored; content says what a file is."""
    path = tmp_path / name
    first, second = random_mask(8, 16, 2, 4).float().t().clone(), random_mask(4, 8, 2, 4).float()
    found = graph(path, first, second)
    assert {layer: (check.shape, check.verdict, check.axis) for layer, check in found.items()} == {
        "val_3": ((16, 8), "holds", "K"),
        "fc2": ((4, 8), "holds", "K"),
    }
    first[8:12, 7] = 1
    assert graph(path, first, second)["val_3"].violation == "column 7, group 2: 4 of 4 non-zero"
    assert [check.layer for check in verify_file(path, exclude=["/fc1/*"])] == ["fc2"]  # nodes have names, too
    assert [check.required for check in verify_file(path, layers=["fc2.weight", "val_3"])] == [True, True]
    swapped = graph(path, random_mask(16, 8, 2, 4).float(), second)["val_3"]
    assert (swapped.verdict, swapped.axis) == ("violated", "N")


def test_large_weights_in_no_time() -> None:
    """Vectorised: a loop would take minutes."""
    weight = random_mask(1024, 4096, 2, 4).half()
    assert check(weight).verdict == "holds"
    weight[1023, 4092:] = 1
    assert check(weight).violation == "row 1023, group 1023: 4 of 4 non-zero"
