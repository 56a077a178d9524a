"""SparseGPT, layer by layer, against the paper's formulas and the original's loop."""

from __future__ import annotations

import pytest
import torch
from small_layers import (
    agreement,
    column_loop,
    every_layer,
    hessian_of,
    inverse_factor,
    layer_case,
    numbers,
    sparsegpt_mask,
    sparsegpt_original,
)
from torch import Tensor

from maskllm4v.oneshot.activations.statistics import Hessian
from maskllm4v.oneshot.methods.sparsegpt import prune_columns, prune_sparsegpt, reversed_cholesky, upper_factor
from maskllm4v.oneshot.prune import Pruned
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import DataError, PatternError


def run_sparsegpt(weight: Tensor, statistic: Hessian, pattern: str, update: bool) -> Pruned:
    return prune_sparsegpt(weight, statistic, NMPattern(pattern), update_weights=update, layer="fc1", seed=0)


@every_layer
@pytest.mark.parametrize("dead", [0, 5])
def test_sparsegpt_mask_without_update(out: int, width: int, pattern: str, dead: int) -> None:
    weight, inputs = layer_case(out, width, dead=dead)
    n, m = numbers(pattern)
    statistic = hessian_of(inputs)
    result = run_sparsegpt(weight, statistic, pattern, update=False)
    assert result.weight is None
    assert agreement({"": result.mask}, {"": sparsegpt_mask(weight, statistic.mean, n, m)}, m) >= 0.999


@every_layer
@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_sparsegpt_with_update(
    out: int, width: int, pattern: str, dead: int, dtype: torch.dtype, tolerance: float
) -> None:
    weight, inputs = layer_case(out, width, dead=dead)
    n, m = numbers(pattern)
    statistic = hessian_of(inputs, dtype)
    result = run_sparsegpt(weight.to(dtype), statistic, pattern, update=True)
    mask, updated = sparsegpt_original(weight, statistic.mean, n, m)
    assert result.weight.dtype is dtype
    assert agreement({"": result.mask}, {"": mask}, m) >= (1 if dtype is torch.float64 else 0.999)
    rows = (result.mask == mask).all(1)  # one other choice changes the rest of its row
    assert rows.double().mean() > 0.8
    torch.testing.assert_close(result.weight.double()[rows], updated[rows], rtol=0, atol=tolerance)
    assert not result.weight[~result.mask].any()
    assert NMPattern(pattern).is_valid(result.mask)


@pytest.mark.parametrize("update", [True, False])
def test_sparsegpt_leaves_its_inputs_alone(update: bool) -> None:
    weight, inputs = layer_case(16, 32, dead=3)
    statistic = hessian_of(inputs)
    before = weight.clone(), statistic.sum_of_products.clone()
    run_sparsegpt(weight, statistic, "2:4", update)
    assert torch.equal(weight, before[0])
    assert torch.equal(statistic.sum_of_products, before[1])


def test_updates_drop_weights_of_dead_inputs() -> None:
    weight, inputs = layer_case(16, 64, dead=20)
    result = run_sparsegpt(weight, hessian_of(inputs), "2:4", update=True)
    dead = ~inputs.any(0)
    assert not result.weight[:, dead].any()
    kept = result.mask[:, dead].reshape(-1)
    assert float(kept.double().mean()) < 0.2  # only where a group has more than two of them


@pytest.mark.parametrize("update", [True, False])
def test_all_inputs_dead(update: bool) -> None:
    weight = torch.randn(8, 16)
    result = run_sparsegpt(weight, hessian_of(torch.zeros(10, 16)), "2:4", update)
    assert NMPattern("2:4").is_valid(result.mask)
    if result.weight is not None:
        assert not result.weight.any()


@every_layer
def test_update_lowers_the_layer_error(out: int, width: int, pattern: str) -> None:
    weight, inputs = layer_case(out, width)
    result = run_sparsegpt(weight, hessian_of(inputs), pattern, update=True)

    def error(pruned: Tensor) -> float:
        return float((inputs @ (pruned - weight).t()).square().sum() / (inputs @ weight.t()).square().sum())

    assert error(result.weight) < error(weight * result.mask)


# Given the factor


COLUMNS = [
    *((768, 768, "2:4"), (768, 384, "1:4"), (384, 768, "4:8")),
    *((48, 300, "3:6"), (7, 260, "2:4"), (1, 132, "1:2"), (5, 4, "2:4"), (33, 56, "3:7"), (40, 280, "1:70")),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("out", "width", "pattern"), COLUMNS)
def test_lazy_updates_are_those_of_the_column_loop(out: int, width: int, pattern: str, dtype: torch.dtype) -> None:
    weight, inputs = layer_case(out, width)
    hinv = inverse_factor(hessian_of(inputs).mean)[0].to(dtype)
    expected, updated = column_loop(weight.to(dtype), hinv, *numbers(pattern))
    columns, factor = weight.to(dtype).t().contiguous(), hinv.clone()
    mask = prune_columns(columns, factor, NMPattern(pattern))
    assert torch.equal(factor, hinv)
    if dtype is torch.float64:
        assert torch.equal(mask, expected)
    assert agreement({"": mask}, {"": expected}, numbers(pattern)[1]) >= 0.999
    rows = (mask == expected).all(1)  # one other choice changes the rest of its row
    assert rows.double().mean() >= 0.9
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(columns.t()[rows], updated[rows], rtol=0, atol=tolerance)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:6", "2:7"])
def test_ties_and_infinities_are_ranked_as_by_topn(pattern: str) -> None:
    """Few distinct scores, so most groups have ties; with U = 1 nothing is passed on, but for what ∞ · 0 is."""
    weight = torch.randint(-3, 4, (60, 20 * numbers(pattern)[1])).float()
    group = torch.where(weight.abs() == 3, weight.sign() * torch.inf, weight).reshape(-1, numbers(pattern)[1])
    for w in (weight, group):
        mask = prune_columns(w.t().contiguous(), torch.eye(w.shape[1]), NMPattern(pattern))
        assert torch.equal(mask, NMPattern(pattern).topn_mask(w.abs()))


@pytest.mark.parametrize("width", [1, 5, 192, 193, 511, 512, 700])
def test_factor_of_the_inverse(width: int) -> None:
    hessian = hessian_of(layer_case(1, width)[1], torch.float64).mean
    factor = upper_factor(reversed_cholesky(hessian))
    torch.testing.assert_close(factor, inverse_factor(hessian)[0], rtol=1e-10, atol=1e-10)
    assert not factor.tril(-1).any()


def test_result_is_ready_to_use() -> None:
    weight, inputs = layer_case(24, 64)
    result = run_sparsegpt(weight.bfloat16(), hessian_of(inputs), "2:4", update=True)
    assert (result.mask.is_contiguous(), result.weight.dtype, result.weight.shape) == (True, torch.bfloat16, (24, 64))
    assert not result.weight[~result.mask].any()


@pytest.mark.parametrize("allowed", ["medium", "autocast"])
def test_updates_are_found_in_full_float32(allowed: str) -> None:
    weight, inputs = layer_case(300, 600)  # large enough for bfloat16 products where the CPU has them
    statistic, allows = hessian_of(inputs), torch.get_float32_matmul_precision()
    expected = run_sparsegpt(weight, statistic, "2:4", update=True)
    try:
        torch.set_float32_matmul_precision("medium" if allowed == "medium" else allows)
        with torch.autocast("cpu", torch.bfloat16, enabled=allowed == "autocast"):
            result = run_sparsegpt(weight, statistic, "2:4", update=True)
    finally:
        torch.set_float32_matmul_precision(allows)
    assert torch.equal(result.mask, expected.mask)
    assert torch.equal(result.weight, expected.weight)


# When something is wrong


def indefinite(lowest: float, width: int = 16) -> Hessian:
    """A Hessian of mean diagonal 1 whose lowest eigenvalue is as given."""
    eigenvalues = torch.full((width,), (width - lowest) / (width - 1), dtype=torch.float64)
    eigenvalues[0] = lowest
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    statistic = Hessian(width, torch.device("cpu"))
    statistic.rows = 2  # so that the mean is the sum
    statistic.sum_of_products = basis @ eigenvalues.diag() @ basis.t()
    return statistic


@pytest.mark.parametrize("width", [16, 600])
@pytest.mark.parametrize(("lowest", "damping", "warned"), [(-0.05, 0.1, 1), (-0.5, 1.0, 2), (-5.0, 10.0, 3)])
def test_damping_is_raised_with_a_warning(lowest: float, damping: float, warned: int, width: int) -> None:
    weight, statistic = torch.randn(16, width, dtype=torch.float64), indefinite(lowest, width)
    with pytest.warns(UserWarning, match=r"'fc1'.*not positive definite at damping") as caught:
        result = run_sparsegpt(weight, statistic, "2:4", update=True)
    assert len(caught) == warned
    mask, updated = sparsegpt_original(weight, statistic.mean, 2, 4, damping)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, updated, rtol=0, atol=1e-9)


def test_hopeless_hessian() -> None:
    with pytest.warns(UserWarning, match="damping"), pytest.raises(DataError, match=r"'fc1'.*not positive definite"):
        run_sparsegpt(torch.randn(4, 16), indefinite(-1e5), "2:4", update=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    inputs = torch.randn(20, 16)
    inputs[3, 4] = value
    with pytest.raises(DataError, match=r"'fc1'.*not finite"):
        run_sparsegpt(torch.randn(4, 16), hessian_of(inputs), "2:4", update=False)


@pytest.mark.parametrize("update", [True, False])
def test_weights_that_are_not_a_number(update: bool) -> None:
    weight, inputs = layer_case(4, 16)
    weight[2, 7] = torch.nan
    with pytest.raises(PatternError, match=r"'fc1'.*NaN"):
        run_sparsegpt(weight, hessian_of(inputs), "2:4", update)


@pytest.mark.parametrize("update", [True, False])
def test_misfit(update: bool) -> None:
    weight, inputs = layer_case(4, 18)
    with pytest.raises(PatternError, match="'fc1': its 18 input features"):
        run_sparsegpt(weight, hessian_of(inputs), "2:4", update)
