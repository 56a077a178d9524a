"""One logit a position: against softmax over all masks, against sampling without replacement, and its limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mask_oracle import ANNEALED, FLOAT32_BOUNDS, Case, equal_in_float64, errors, noise, norm, table, textbook
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from maskllm4v.sparsity.gumbel import masked_weight, topn
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import philox_key

PATTERNS = [(2, 4), (4, 8), (2, 8), (3, 5), (7, 8), (1, 4)]
every_pattern = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])
soft_and_hard = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])


class Positions(Case):
    """A case with a logit a position; functions are called without candidates."""

    def __init__(self, n: int, m: int, **how: Any) -> None:
        super().__init__(n, m, **how)
        self.n, self.m = n, m
        self.logits, self.uniform = self.logits[:m].clone(), noise(self.key, m, self.logits.shape[1])
        if len(self.logits) < m:
            self.logits = 0.2 * torch.randn(m, self.logits.shape[1], dtype=self.weight.dtype)
        self.uniform = self.uniform.to(self.weight.dtype)

    def run(self, function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, **how: Any) -> list[Tensor]:
        def without_candidates(weight: Tensor, logits: Tensor, _: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
            return function(weight, logits, None, kept=self.n, **given)

        return super().run(without_candidates, dtype, **how)


def over_all_masks(
    weight: Tensor,
    logits: Tensor,
    candidates: None,
    *,
    kept: int,
    tau: float,
    scaling: float,
    hard: bool = False,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: softmax over every mask of the sum of its positions' perturbed logits."""
    theta = scaling * logits
    if uniform is not None:
        theta = theta - torch.log(-torch.log(uniform))
    theta = theta / tau
    masks = table(kept, len(logits), weight.dtype)
    mask = masks.t() @ torch.softmax(masks @ theta, 0)
    if hard:
        largest = torch.zeros_like(mask).scatter_(0, theta.topk(kept, 0).indices, 1.0)
        mask = largest - mask.detach() + mask
    masked = weight * mask.t().reshape(weight.shape)
    return masked, masked.square().sum()


def soft_mask(logits: Tensor, kept: int, **how: Any) -> Tensor:
    """``[groups, M]``."""
    ones = torch.ones(logits.shape[::-1], dtype=logits.dtype)
    return masked_weight(ones, logits, None, kept=kept, **how)[0]


# The function and its gradients


@every_pattern
@soft_and_hard
@pytest.mark.parametrize(("tau", "scaling"), ANNEALED)
def test_equals_softmax_over_all_masks(n: int, m: int, hard: bool, tau: float, scaling: float) -> None:
    case, how = Positions(n, m, out=24), {"tau": tau, "scaling": scaling, "hard": hard}
    found = case.drawn("auto", torch.float64, **how)
    equal_in_float64(found, case.run(over_all_masks, torch.float64, **how))


@every_pattern
@soft_and_hard
def test_without_noise(n: int, m: int, hard: bool) -> None:
    case, how = Positions(n, m), {"tau": 1.0, "scaling": 10.0, "hard": hard, "uniform": None}
    equal_in_float64(case.run(masked_weight, torch.float64, **how), case.run(over_all_masks, torch.float64, **how))


@pytest.mark.parametrize("m", [2, 4, 8])
@soft_and_hard
def test_one_of_m_is_the_candidate_form(m: int, hard: bool) -> None:
    case, how = Positions(1, m), {"tau": 0.7, "scaling": 10.0, "hard": hard}
    candidates = table(1, m, torch.float64)

    def by_candidates(weight: Tensor, logits: Tensor, _: None, *, kept: int, **given: Any) -> tuple[Tensor, Tensor]:
        return textbook(weight, logits, candidates, **given)

    equal_in_float64(case.drawn("auto", torch.float64, **how), case.run(by_candidates, torch.float64, **how))


@every_pattern
def test_gradcheck(n: int, m: int) -> None:
    case = Positions(n, m, out=2, groups_per_row=2)

    def function(weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return masked_weight(weight, logits, None, kept=n, tau=1.3, scaling=5.0, key=case.key)

    assert torch.autograd.gradcheck(function, (case.weight.requires_grad_(), case.logits.requires_grad_()))


def test_frozen_weight_gets_no_gradient() -> None:
    case = Positions(2, 4)
    masked, _ = masked_weight(case.weight, case.logits.requires_grad_(), None, kept=2, tau=1.0, scaling=10.0)
    masked.backward(case.upstream)
    assert case.weight.grad is None
    assert case.logits.grad.any()


@every_pattern
@pytest.mark.parametrize(("tau", "scaling"), ANNEALED)
def test_soft_mask_keeps_n_weights(n: int, m: int, tau: float, scaling: float) -> None:
    mask = soft_mask(torch.randn(m, 300), n, tau=tau, scaling=scaling, key=philox_key(0, "sum"))
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1
    torch.testing.assert_close(mask.sum(1), torch.full((300,), float(n)), rtol=2e-6, atol=0)


# What is drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_pattern
def test_cold_masks_are_the_largest_perturbed_logits(n: int, m: int, dtype: torch.dtype) -> None:
    logits, key = torch.randn(m, 500, dtype=dtype), philox_key(0, "cold")
    perturbed = 10 * logits - torch.log(-torch.log(noise(key, m, 500).to(dtype)))
    wanted = torch.zeros_like(logits).scatter_(0, perturbed.topk(n, 0).indices, 1.0).t()
    assert torch.equal(soft_mask(logits, n, tau=1e-9, scaling=10.0, key=key), wanted)
    assert torch.equal(soft_mask(logits, n, tau=3.0, scaling=10.0, key=key, hard=True), wanted)


@soft_and_hard
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (4, 8)])
def test_positions_are_drawn_without_replacement(n: int, m: int, hard: bool) -> None:
    """Inclusion as often as in successive draws with odds exp(s·l), each without those drawn before."""
    groups, logits = 100_000, torch.linspace(-0.15, 0.15, m)[torch.randperm(m)]
    odds = (10 * logits.double()).exp().tolist()
    wanted = torch.zeros(m, dtype=torch.float64)
    for order in itertools.permutations(range(m), n):
        chance, left = 1.0, sum(odds)
        for j in order:
            chance *= odds[j] / left
            left -= odds[j]
        wanted[list(order)] += chance
    mask = soft_mask(
        logits[:, None].repeat(1, groups), n, tau=1.0 if hard else 1e-3, scaling=10.0, hard=hard, key=philox_key(3, "x")
    )
    found = mask.double().mean(0)
    assert float(((found - wanted) / (wanted * (1 - wanted) / groups).sqrt()).abs().max()) < 4.5


@pytest.mark.parametrize("hard", [False, True])
def test_ties_go_to_the_first_positions(hard: bool) -> None:
    mask = soft_mask(torch.zeros(4, 3), 2, tau=1.0, scaling=10.0, hard=hard)
    assert mask.tolist() == [[1.0, 1.0, 0.0, 0.0] if hard else [0.5] * 4] * 3


# Numbers


@every_pattern
@soft_and_hard
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_saturated_logits_are_finite(n: int, m: int, hard: bool, size: float, tau: float) -> None:
    case = Positions(n, m, dtype=torch.float32)
    chosen = table(n, m)[torch.arange(case.logits.shape[1]) % math.comb(m, n)]  # [groups, M]
    case.logits = size * chosen.t()
    found = case.drawn("auto", torch.float32, tau=tau, scaling=100.0, hard=hard)
    assert all(t.isfinite().all() for t in found)
    if size > 0:  # certain: the mask is that one, and nothing pulls any more
        assert torch.equal(found[0], case.weight * chosen.reshape(case.weight.shape))
        assert not found[2].any()


@every_pattern
@soft_and_hard
@pytest.mark.parametrize(("tau", "scaling", "value_bound", "gradient_bound"), FLOAT32_BOUNDS)
def test_float32_error(
    n: int, m: int, hard: bool, tau: float, scaling: float, value_bound: float, gradient_bound: float
) -> None:
    case, how = Positions(n, m, out=96, groups_per_row=64, dtype=torch.float32), {"tau": tau, "scaling": scaling}
    exact = case.run(over_all_masks, torch.float64, hard=hard, **how)
    found = errors(case.drawn("auto", torch.float32, hard=hard, **how), exact, case.weight)
    theirs = errors(case.run(over_all_masks, torch.float32, hard=hard, **how), exact, case.weight)
    for i, bound in ((0, value_bound), (2, gradient_bound), (3, gradient_bound)):
        assert found[i] <= bound
        assert found[i] <= 2 * theirs[i] + 1e-7


@soft_and_hard
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_32(hard: bool, half: torch.dtype) -> None:
    case = Positions(4, 8, out=96, groups_per_row=64, dtype=torch.float32)
    for name in ("weight", "logits", "upstream"):
        setattr(case, name, getattr(case, name).to(half).float())
    how = {"tau": 0.7, "scaling": 10.3, "hard": hard}  # which 16 bits do not hold
    exact, found = case.run(over_all_masks, torch.float64, **how), case.drawn("auto", half, **how)
    unit = torch.finfo(half).eps
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.51 * unit, atol=1e-6)
    assert float(found[1]) == pytest.approx(float(exact[1]), rel=1e-6)  # of the values before they are rounded
    assert all(norm(a.double() - b, b) <= unit for a, b in zip(found[2:], exact[2:], strict=True))


@soft_and_hard
def test_autocast_changes_nothing(hard: bool) -> None:
    case, how = Positions(4, 8, dtype=torch.float32), {"tau": 1.0, "scaling": 100.0, "hard": hard}
    plain = case.drawn("auto", torch.float32, **how)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case.drawn("auto", torch.float32, **how)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@soft_and_hard
@pytest.mark.parametrize("numbers", [1, 200, 1000])
def test_spans_change_nothing(hard: bool, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, how = Positions(2, 4), {"tau": 0.7, "scaling": 10.0, "hard": hard}
    whole, theta = case.drawn("auto", torch.float64, **how), 3 * torch.randn(4, 30, dtype=torch.float64)
    chances = topn.max_probability(theta, 2)
    monkeypatch.setattr(topn, "CPU_NUMBERS", numbers)
    equal_in_float64(case.drawn("auto", torch.float64, **how), whole)
    torch.testing.assert_close(topn.max_probability(theta, 2), chances, rtol=1e-13, atol=0)


@soft_and_hard
def test_no_groups(hard: bool) -> None:
    masked, energy, grad_logits, grad_weight = Positions(4, 8, out=0).drawn(
        "auto", torch.float64, tau=0.7, scaling=10.0, hard=hard
    )
    assert masked.shape == grad_weight.shape == (0, 40)
    assert grad_logits.shape == (8, 0)
    assert float(energy) == 0


@soft_and_hard
@pytest.mark.parametrize("view", [lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 2)[..., 0]])
def test_strided_tensors_equal_contiguous_ones(view: Callable[[Tensor], Tensor], hard: bool) -> None:
    case, how = Positions(4, 8), {"tau": 1.0, "scaling": 10.0, "hard": hard}
    expected = case.drawn("auto", torch.float64, **how)
    for name in ("weight", "logits", "uniform", "upstream"):
        setattr(case, name, view(getattr(case, name)))
    for found in (case.drawn("auto", torch.float64, **how), case.run(masked_weight, torch.float64, **how)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@every_pattern
def test_chance_of_the_likeliest_mask(n: int, m: int) -> None:
    theta = 3 * torch.randn(m, 50, dtype=torch.float64)
    before = theta.clone()
    wanted = torch.softmax(table(n, m, torch.float64) @ theta, 0).amax(0)
    torch.testing.assert_close(topn.max_probability(theta, n), wanted, rtol=1e-12, atol=0)
    assert torch.equal(theta, before)


def test_wide_groups() -> None:
    """8:16, over all of its 12870 masks."""
    case, how = Positions(8, 16, out=2), {"tau": 0.5, "scaling": 10.0}
    equal_in_float64(case.drawn("auto", torch.float64, **how), case.run(over_all_masks, torch.float64, **how))
    hard = case.drawn("auto", torch.float64, hard=True, **how)
    equal_in_float64(hard, case.run(over_all_masks, torch.float64, hard=True, **how))


# Where it is computed


def test_inputs_are_all_that_is_kept_for_backward() -> None:
    weight, logits = torch.randn(64, 64), torch.randn(8, 512, requires_grad=True)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_weight(weight, logits, None, kept=4, tau=0.7, scaling=10.0, key=philox_key(0, "kept"))
    known = {weight.data_ptr(), logits.data_ptr()}
    assert sum(t.numel() for t in saved if t.data_ptr() not in known) <= 4  # τ, s and the key
    assert any(t.data_ptr() == logits.data_ptr() for t in saved)


def test_triton_is_refused() -> None:
    with pytest.raises(ConfigError, match="'triton', which needs a logit a candidate; allowed for one a position: 'a"):
        masked_weight(torch.ones(1, 4), torch.zeros(4, 1), None, kept=2, tau=1.0, scaling=1.0, backend="triton")


@pytest.mark.parametrize("backend", ["chunked", "compiled"])
def test_other_backends_fall_back(backend: str) -> None:
    case, how = Positions(4, 8, dtype=torch.float32), {"tau": 0.7, "scaling": 10.0}
    pairs = zip(case.drawn(backend, torch.float32, **how), case.drawn("auto", torch.float32, **how), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_how_many_are_kept_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match="a logit a position needs kept"):
        masked_weight(torch.ones(2, 8), torch.zeros(8, 2), None, tau=1.0, scaling=1.0)
