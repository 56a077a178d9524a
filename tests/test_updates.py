"""Updates of one layer's weights, against direct solutions in float64 and against one another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_layers import column_loop, every_layer, hessian_of, inverse_factor, layer_case, numbers
from torch import Tensor

from maskllm4v.oneshot.activations.statistics import CrossCovariance, Hessian
from maskllm4v.oneshot.methods.sparsegpt import prune_sparsegpt
from maskllm4v.oneshot.weight_update import least_squares
from maskllm4v.oneshot.weight_update.least_squares import solve_rows, update_least_squares
from maskllm4v.oneshot.weight_update.sparsegpt import update_sparsegpt
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import DataError


def random_mask(out: int, width: int, pattern: str) -> Tensor:
    return NMPattern(pattern).topn_mask(torch.rand(out, width))


def paired_of(inputs: Tensor, twins: Tensor) -> CrossCovariance:
    statistic = CrossCovariance(inputs.shape[1], inputs.device)
    statistic.update(inputs, twins)
    return statistic


def least(
    weight: Tensor, mask: Tensor, statistic: Hessian | CrossCovariance, pattern: str, damping: float = 0.1
) -> Tensor:
    return update_least_squares(weight, mask, statistic, NMPattern(pattern), damping=damping, layer="fc1")


def direct(weight: Tensor, mask: Tensor, inputs: Tensor, twins: Tensor, damping: float) -> Tensor:
    """min ‖x′ w − x W‖²·2/n + λ‖w − W‖² over the kept weights of each row, by QR of the stacked system."""
    weight, inputs, twins = weight.double(), inputs.double(), twins.double()
    scale = (2 / len(inputs)) ** 0.5
    diagonal = (scale * inputs).square().sum(0)
    dead = diagonal == 0
    ridge = (damping * diagonal[~dead].mean() + dead.double()).sqrt()
    left = torch.cat([scale * inputs, ridge.diag()])
    found = torch.zeros_like(weight)
    for row, (w, kept) in enumerate(zip(weight, mask, strict=True)):
        right = torch.cat([scale * twins @ w, ridge * w])
        found[row, kept] = torch.linalg.lstsq(left[:, kept], right[:, None], driver="gelsd").solution[:, 0]
    return found


@every_layer
@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize("damping", [0.1, 0.01])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_least_squares_is_the_direct_solution(
    out: int, width: int, pattern: str, dead: int, damping: float, asymmetric: bool
) -> None:
    weight, inputs = layer_case(out, width, dead=dead)
    twins = inputs + 0.3 * torch.randn_like(inputs) if asymmetric else inputs
    mask = random_mask(out, width, pattern)
    statistic = paired_of(inputs, twins) if asymmetric else hessian_of(inputs)
    found, expected = least(weight, mask, statistic, pattern, damping), direct(weight, mask, inputs, twins, damping)
    assert found.dtype is torch.float32
    assert not found[~mask].any()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@every_layer
def test_least_squares_in_float64_is_exact(out: int, width: int, pattern: str) -> None:
    weight, inputs = layer_case(out, width)
    weight, mask = weight.double(), random_mask(out, width, pattern)
    statistic = hessian_of(inputs)
    statistic.sum_of_products = inputs.double().t() @ inputs.double()
    found = least(weight, mask, statistic, pattern)
    expected = direct(weight, mask, inputs, inputs, 0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("damping", [0.1, 0.01])
@pytest.mark.parametrize("size", [1, 1000])
def test_float32_is_enough(size: float, damping: float, asymmetric: bool) -> None:
    """Given the same sums, also where a few inputs are far larger than the rest."""
    weight, inputs = layer_case(24, 512, rows=2048)
    inputs[:, :3] *= size
    twins, mask = inputs * (1 + 0.1 * torch.randn_like(inputs)), random_mask(24, 512, "2:4")
    statistic, exact = (paired_of(inputs, twins) if asymmetric else hessian_of(inputs) for _ in range(2))
    for sums in (exact.hessian, exact) if isinstance(exact, CrossCovariance) else (exact,):
        name = "sum_of_crosses" if isinstance(sums, CrossCovariance) else "sum_of_products"
        setattr(sums, name, getattr(sums, name).double())
    found = least(weight, mask, statistic, "2:4", damping)
    expected = least(weight.double(), mask, exact, "2:4", damping)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_weights_that_can_be_reached_are() -> None:
    """Where x W can be made of the kept inputs alone, asymmetric least squares without damping finds it."""
    inputs = torch.randn(500, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False] * 2])
    wanted = torch.tensor([[1.0, -2.0, 0, 0, 0.5, 3.0, 0, 0]], dtype=torch.float64)
    weight = torch.randn(1, 8, dtype=torch.float64)
    twins = torch.zeros_like(inputs)
    twins[:, :1] = inputs @ wanted.t() / weight[:, :1]  # x W = x′ w
    statistic = paired_of(inputs.float(), twins.float())
    statistic.hessian.sum_of_products, statistic.sum_of_crosses = inputs.t() @ inputs, inputs.t() @ twins
    torch.testing.assert_close(least(weight, mask, statistic, "2:4", damping=0.0), wanted)


def error(updated: Tensor, weight: Tensor, statistic: Hessian, damping: float) -> Tensor:
    """(w − W)(H + λ)(w − W)ᵀ of each row, among inputs that fire: what both methods minimise."""
    h = statistic.mean.double()
    dead = h.diagonal() == 0
    h.diagonal().add_(damping * h.diagonal()[~dead].mean())
    difference = (updated - weight).double().masked_fill(dead, 0)
    return ((difference @ h) * difference).sum(1)


@given(
    seed=st.integers(0, 2**31 - 1),
    pattern=st.sampled_from(["2:4", "1:4", "4:8", "3:6"]),
    groups=st.integers(1, 12),
    dead=st.integers(0, 3),
    rows=st.integers(1, 200),
    damping=st.sampled_from([0.01, 0.1, 1.0]),
    own=st.booleans(),
)
@example(seed=0, pattern="2:4", groups=12, dead=0, rows=200, damping=0.01, own=True)
def test_error_is_never_above_sparsegpts(
    seed: int, pattern: str, groups: int, dead: int, rows: int, damping: float, own: bool
) -> None:
    """On the same mask (SparseGPT's own or any) and the same damped Hessian, row by row."""
    torch.manual_seed(seed)
    width = groups * numbers(pattern)[1]
    weight, inputs = layer_case(6, width, rows=rows, dead=min(dead, width - 1))
    weight, statistic = weight.double(), hessian_of(inputs, torch.float64)
    mask = random_mask(6, width, pattern)
    if own:
        mask = prune_sparsegpt(weight, statistic, NMPattern(pattern), update_weights=True, layer="x", seed=0).mask
    ours = error(least(weight, mask, statistic, pattern, damping), weight, statistic, damping)
    given_mask = update_sparsegpt(weight, mask, statistic, NMPattern(pattern), damping=damping, layer="x")
    theirs, pruned = (error(w, weight, statistic, damping) for w in (given_mask, weight * mask))
    assert (ours <= theirs * (1 + 1e-9) + 1e-12).all()
    assert (ours <= pruned * (1 + 1e-9) + 1e-12).all()


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer_case(50, 64)
    mask = random_mask(50, 64, "2:4")
    whole = least(weight, mask, hessian_of(inputs), "2:4")
    seen = []
    factorise = torch.linalg.cholesky_ex

    def counted(systems: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(systems))
        return factorise(systems)

    monkeypatch.setattr(least_squares, "CHUNK", 7 * 32 * 32 * 4)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    assert torch.equal(least(weight, mask, hessian_of(inputs), "2:4"), whole)
    assert seen == [7] * 7 + [1]


def test_a_row_larger_than_a_chunk_is_solved_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer_case(3, 64)
    mask = random_mask(3, 64, "2:4")
    whole = least(weight, mask, hessian_of(inputs), "2:4")
    monkeypatch.setattr(least_squares, "CHUNK", 1)
    assert torch.equal(least(weight, mask, hessian_of(inputs), "2:4"), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_row_is_named(dtype: torch.dtype) -> None:
    """The third row keeps two inputs that are the same; without damping its system has no solution."""
    inputs = torch.randn(100, 8)
    inputs[:, 1] = inputs[:, 0]
    mask = torch.tensor([[True, False, True, False] * 2]).repeat(5, 1)
    mask[2, :4] = mask[4, :4] = torch.tensor([True, True, False, False])
    weight = torch.randn(5, 8).to(dtype)
    with pytest.raises(DataError, match=r"layer 'fc1', row 2: .* of its 4 kept weights is singular; calibrate on more"):
        least(weight, mask, hessian_of(inputs, dtype), "2:4", damping=0.0)
    assert least(weight, mask, hessian_of(inputs, dtype), "2:4", damping=1e-3).isfinite().all()


def test_fewer_samples_than_kept_weights_need_damping() -> None:
    weight, mask = torch.randn(4, 64), random_mask(4, 64, "2:4")
    statistic = hessian_of(torch.randn(20, 64))
    with pytest.raises(DataError, match=r"row 0: .* singular"):
        least(weight, mask, statistic, "2:4", damping=0.0)
    assert least(weight, mask, statistic, "2:4").isfinite().all()


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(bad: float, asymmetric: bool) -> None:
    inputs = torch.randn(100, 8)
    broken = inputs.clone()
    broken[3, 2] = bad
    statistic = paired_of(inputs, broken) if asymmetric else hessian_of(broken)
    with pytest.raises(DataError, match="layer 'fc1': calibration gave inputs that are not finite"):
        least(torch.randn(4, 8), random_mask(4, 8, "2:4"), statistic, "2:4")


@pytest.mark.parametrize("asymmetric", [True, False])
def test_weights_of_dead_inputs_stay(asymmetric: bool) -> None:
    weight, inputs = layer_case(16, 64, dead=20)
    mask, dead = random_mask(16, 64, "2:4"), ~inputs.any(0)
    twins = inputs + torch.randn(64)  # fires in the dense network
    found = least(weight, mask, paired_of(inputs, twins) if asymmetric else hessian_of(inputs), "2:4")
    torch.testing.assert_close(found[:, dead], (weight * mask)[:, dead])
    silent = hessian_of(torch.zeros(10, 64))
    torch.testing.assert_close(least(weight, mask, silent, "2:4"), weight * mask)


@pytest.mark.parametrize("dead", [0, 20])
def test_the_scale_of_inputs_changes_nothing(dead: int) -> None:
    """Damping is a share of what fires."""
    weight, inputs = layer_case(16, 64, dead=dead)
    mask = random_mask(16, 64, "2:4")
    found = [least(weight, mask, hessian_of(scale * inputs), "2:4") for scale in (1.0, 2.0**-10)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype: torch.dtype) -> None:
    weight, inputs = layer_case(8, 16)
    mask = random_mask(8, 16, "2:4")
    for update in (update_least_squares, update_sparsegpt):
        new = update(weight.to(dtype), mask, hessian_of(inputs), NMPattern("2:4"), damping=0.1, layer="x")
        assert new.dtype is dtype


@pytest.mark.parametrize("update", [update_least_squares, update_sparsegpt])
def test_inputs_are_left_alone(update: object) -> None:
    weight, inputs = layer_case(16, 32, dead=3)
    mask, statistic = random_mask(16, 32, "2:4"), hessian_of(inputs)
    before = weight.clone(), mask.clone(), statistic.sum_of_products.clone()
    update(weight, mask, statistic, NMPattern("2:4"), damping=0.1, layer="x")  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip((weight, mask, statistic.sum_of_products), before, strict=True))


def test_rows_of_any_right_hand_side() -> None:
    width = 24
    factor = torch.randn(width, width, dtype=torch.float64)
    h, target = factor @ factor.t() + torch.eye(width), torch.randn(5, width, dtype=torch.float64)
    mask = random_mask(5, width, "1:4")
    found = solve_rows(h, target, mask)
    for row, kept in enumerate(mask):
        torch.testing.assert_close(found[row, kept], torch.linalg.solve(h[kept][:, kept], target[row, kept]))
    assert not found[~mask].any()


# SparseGPT's update


@every_layer
@pytest.mark.parametrize("dead", [0, 5])
def test_sparsegpt_on_its_own_mask_is_sparsegpt(out: int, width: int, pattern: str, dead: int) -> None:
    weight, inputs = layer_case(out, width, dead=dead)
    statistic = hessian_of(inputs)
    pruned = prune_sparsegpt(weight, statistic, NMPattern(pattern), update_weights=True, layer="x", seed=0)
    found = update_sparsegpt(weight, pruned.mask, statistic, NMPattern(pattern), damping=0.01, layer="x")
    assert torch.equal(found, pruned.weight)


@every_layer
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_sparsegpt_on_any_mask_is_the_column_loop(out: int, width: int, pattern: str, damping: float) -> None:
    weight, inputs = layer_case(out, width, dead=3)
    weight, statistic = weight.double(), hessian_of(inputs, torch.float64)
    mask = random_mask(out, width, pattern)
    hinv, dead = inverse_factor(statistic.mean, damping)
    w = weight.masked_fill(dead, 0)
    for j in range(width):
        lost = torch.where(mask[:, j], 0.0, w[:, j]) / hinv[j, j]
        w[:, j:] -= lost[:, None] * hinv[j, j:]
    found = update_sparsegpt(weight, mask, statistic, NMPattern(pattern), damping=damping, layer="x")
    torch.testing.assert_close(found, w.masked_fill(~mask, 0), rtol=0, atol=1e-9)
    assert not found[~mask].any()
    assert not torch.allclose(found, column_loop(weight, hinv, *numbers(pattern))[1], atol=1e-3)  # its own mask


def test_sparsegpt_names_the_layer_whose_inputs_are_not_finite() -> None:
    statistic = hessian_of(torch.full((10, 8), float("nan")))
    with pytest.raises(DataError, match=r"'fc1'.*not finite"):
        update_sparsegpt(
            torch.randn(4, 8), random_mask(4, 8, "2:4"), statistic, NMPattern("2:4"), damping=0.1, layer="fc1"
        )


@pytest.mark.filterwarnings("ignore:.*raised")
def test_sparsegpts_damping_is_raised_from_nothing() -> None:
    weight, inputs = layer_case(4, 32, rows=10)  # a Hessian of rank 10
    mask = random_mask(4, 32, "2:4")
    found = update_sparsegpt(weight, mask, hessian_of(inputs), NMPattern("2:4"), damping=0.0, layer="x")
    assert torch.isfinite(found).all()
    assert not found[~mask].any()
