"""The mask operation against the textbook form, in float64 with explicit noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from maskllm4v.gumbel import masked_weight
from maskllm4v.randomness import CHUNK, philox_key, uniforms

PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 8), (1, 2)]
ANNEALED = [(4.0, 10.0), (1.0, 100.0), (0.05, 100.0)]  # (τ, s): first and last of the recipe, and the short one
every_pattern = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])
soft_and_hard = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])


def table(n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Candidates ``[K, M]`` in lexicographic order."""
    return torch.tensor([[float(j in kept) for j in range(m)] for kept in itertools.combinations(range(m), n)]).to(
        dtype
    )


def textbook(
    weight: Tensor,
    logits: Tensor,
    candidates: Tensor,
    *,
    tau: float,
    scaling: float,
    hard: bool,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """MaskLLM, Eq. 5-7, as printed: softmax over a last axis of K, then a product with the candidates."""
    z = scaling * logits.t()
    if uniform is not None:
        z = z - torch.log(-torch.log(uniform.t()))
    p = torch.softmax(z / tau, dim=-1)
    if hard:
        one_hot = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
        p = one_hot - p.detach() + p
    masked = weight * (p @ candidates).reshape(weight.shape)
    return masked, masked.square().sum()


class Case:
    """One random input, and what an implementation makes of it."""

    def __init__(self, n: int, m: int, out: int = 6, groups_per_row: int = 5, dtype: torch.dtype = torch.float64):
        self.candidates = table(n, m, dtype)
        candidates, groups = self.candidates.shape[0], out * groups_per_row
        self.weight = torch.randn(out, groups_per_row * m, dtype=dtype)
        self.logits = 0.2 * torch.randn(candidates, groups, dtype=dtype)
        self.uniform = uniforms(philox_key(0, "case"), 0, candidates, groups).to(dtype)
        self.upstream = torch.randn_like(self.weight)

    def run(self, function: object, dtype: torch.dtype, **how: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masked weight, energy, and the gradients of <upstream, wm> − 0.37·energy by logits and weight."""
        weight = self.weight.to(dtype, copy=True).requires_grad_()
        logits = self.logits.to(dtype, copy=True).requires_grad_()
        masked, energy = function(
            weight, logits, self.candidates.to(dtype), **{"uniform": self.uniform.to(dtype), "hard": False, **how}
        )
        loss = (masked * self.upstream.to(dtype)).sum() - 0.37 * energy
        return masked.detach(), energy.detach(), *torch.autograd.grad(loss, (logits, weight))


def largest(difference: Tensor, relative_to: Tensor) -> float:
    return float(difference.abs().max() / relative_to.abs().max())


def norm(difference: Tensor, relative_to: Tensor) -> float:
    return float(difference.norm() / relative_to.norm())


@every_pattern
@soft_and_hard
@pytest.mark.parametrize(("tau", "scaling"), ANNEALED)
def test_equals_textbook(n: int, m: int, hard: bool, tau: float, scaling: float) -> None:
    case = Case(n, m)
    found = case.run(masked_weight, torch.float64, tau=tau, scaling=scaling, hard=hard)
    expected = case.run(textbook, torch.float64, tau=tau, scaling=scaling, hard=hard)
    assert float((found[0] - expected[0]).abs().max()) <= 1e-12
    assert float(found[1]) == pytest.approx(float(expected[1]), rel=1e-12)
    assert float(expected[2].norm()) > 0
    assert norm(found[2] - expected[2], expected[2]) <= 1e-10
    assert norm(found[3] - expected[3], expected[3]) <= 1e-10


@every_pattern
@soft_and_hard
def test_without_noise_equals_textbook(n: int, m: int, hard: bool) -> None:
    case = Case(n, m)
    found = case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=hard, uniform=None)
    expected = case.run(textbook, torch.float64, tau=1.0, scaling=10.0, hard=hard, uniform=None)
    assert float((found[0] - expected[0]).abs().max()) <= 1e-12
    assert norm(found[2] - expected[2], expected[2]) <= 1e-10


@soft_and_hard
@pytest.mark.parametrize("part", ["masked", "energy"])
def test_gradient_of_each_output_alone(hard: bool, part: str) -> None:
    case = Case(2, 4)
    gradients = []
    for function in (masked_weight, textbook):
        logits = case.logits.clone().requires_grad_()
        masked, energy = function(
            case.weight, logits, case.candidates, tau=1.0, scaling=10.0, hard=hard, uniform=case.uniform
        )
        ((masked * case.upstream).sum() if part == "masked" else energy).backward()
        gradients.append(logits.grad)
    assert norm(gradients[0] - gradients[1], gradients[1]) <= 1e-10


@every_pattern
def test_gradcheck(n: int, m: int) -> None:
    case = Case(n, m, out=2, groups_per_row=2)

    def function(weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return masked_weight(weight, logits, case.candidates, tau=1.3, scaling=5.0, uniform=case.uniform)

    assert torch.autograd.gradcheck(function, (case.weight.requires_grad_(), case.logits.requires_grad_()))


@every_pattern
def test_hard_keeps_weights_of_the_most_probable_candidate(n: int, m: int) -> None:
    case = Case(n, m)
    masked, _, _, _ = case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=True)
    scores = 10.0 * case.logits - torch.log(-torch.log(case.uniform))
    mask = case.candidates[scores.argmax(0)].reshape(case.weight.shape)
    assert torch.equal(masked, case.weight * mask)


def test_frozen_weight_gets_no_gradient() -> None:
    case = Case(2, 4)
    logits = case.logits.requires_grad_()
    masked, _ = masked_weight(case.weight, logits, case.candidates, tau=1.0, scaling=1.0, uniform=case.uniform)
    masked.sum().backward()
    assert case.weight.grad is None
    assert logits.grad is not None


@soft_and_hard
def test_inputs_are_left_alone(hard: bool) -> None:
    case = Case(2, 4)
    before = [t.clone() for t in (case.weight, case.logits, case.candidates, case.uniform)]
    case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=hard)
    for now, then in zip((case.weight, case.logits, case.candidates, case.uniform), before, strict=True):
        assert torch.equal(now, then)


@soft_and_hard
@pytest.mark.parametrize("groups", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)], ids=["2:4", "1:2"])
def test_key_draws_the_uniforms_of_each_chunk(n: int, m: int, groups: int, hard: bool) -> None:
    case = Case(n, m, out=groups, groups_per_row=1, dtype=torch.float32)
    key = philox_key(1, "noise")
    sizes = [min(CHUNK, groups - start) for start in range(0, groups, CHUNK)]
    noise = torch.cat([uniforms(key, i, len(case.candidates), size) for i, size in enumerate(sizes)], 1)
    how = {"tau": 1.0, "scaling": 10.0, "hard": hard}
    drawn = case.run(masked_weight, torch.float32, uniform=None, key=key, **how)
    explicit = case.run(masked_weight, torch.float32, uniform=noise, **how)
    for a, b in zip(drawn, explicit, strict=True):
        assert torch.equal(a, b)


def test_more_than_one_chunk_equals_textbook() -> None:
    case = Case(2, 4, out=CHUNK + 1, groups_per_row=1)
    case.uniform = torch.cat([uniforms(philox_key(2), i, 6, g) for i, g in enumerate((CHUNK, 1))], 1).double()
    found = case.run(masked_weight, torch.float64, tau=1.0, scaling=100.0)
    expected = case.run(textbook, torch.float64, tau=1.0, scaling=100.0)
    assert float((found[0] - expected[0]).abs().max()) <= 1e-12
    assert float(found[1]) == pytest.approx(float(expected[1]), rel=1e-12)
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert norm(a - b, b) <= 1e-10
        assert norm(a[..., -1] - b[..., -1], b[..., -1]) <= 1e-10


@soft_and_hard
@pytest.mark.parametrize("columns", [4, 20])
@pytest.mark.parametrize("view", [lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 2)[..., 0]])
def test_strided_tensors_equal_contiguous_ones(columns: int, view: object, hard: bool) -> None:
    case = Case(2, 4, groups_per_row=columns // 4)
    expected = case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=hard)
    for name in ("weight", "logits", "uniform", "upstream"):
        setattr(case, name, view(getattr(case, name)))
        assert not getattr(case, name).is_contiguous()
    found = case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=hard)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@every_pattern
@soft_and_hard
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_saturated_logits_are_finite(n: int, m: int, hard: bool, size: float) -> None:
    case = Case(n, m, dtype=torch.float32)
    case.logits = torch.zeros_like(case.logits)
    chosen = torch.arange(case.logits.shape[1]) % len(case.candidates)
    case.logits[chosen, torch.arange(len(chosen))] = size
    masked, energy, grad_logits, grad_weight = case.run(
        masked_weight, torch.float32, tau=0.05, scaling=100.0, hard=hard
    )
    assert all(t.isfinite().all() for t in (masked, energy, grad_logits, grad_weight))
    if size > 0:  # certain: the mask is that candidate, and nothing pulls any more
        assert torch.equal(masked, case.weight * case.candidates[chosen].reshape(case.weight.shape))
        assert not grad_logits.any()
    else:  # impossible: the rest share the probability
        assert not grad_logits[chosen, torch.arange(len(chosen))].any()


@every_pattern
def test_sampled_frequencies_are_the_softmax(n: int, m: int) -> None:
    groups, candidates = 20_000, table(n, m, torch.float32)
    logits = torch.linspace(-0.1, 0.1, len(candidates))[torch.randperm(len(candidates))]
    expected = groups * torch.softmax(10.0 * logits.double(), 0)
    chi_square = 0.0
    for seed in range(20):
        masked, _ = masked_weight(
            torch.ones(groups, m),
            logits[:, None].repeat(1, groups),
            candidates,
            tau=0.01,
            scaling=10.0,
            hard=True,
            key=philox_key(seed, "frequencies"),
        )
        counts = (masked @ candidates.t()).argmax(1).bincount(minlength=len(candidates)).double()
        chi_square += float(((counts - expected) ** 2 / expected).sum())
    freedom = 20 * (len(candidates) - 1)
    # Four standard deviations either way: too even would be as wrong as too uneven.
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@every_pattern
@soft_and_hard
def test_autocast_changes_nothing(n: int, m: int, hard: bool) -> None:
    case = Case(n, m, dtype=torch.float32)
    plain = case.run(masked_weight, torch.float32, tau=1.0, scaling=100.0, hard=hard)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case.run(masked_weight, torch.float32, tau=1.0, scaling=100.0, hard=hard)
    for a, b in zip(plain, mixed, strict=True):
        assert b.dtype is torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)], ids=["2:4", "4:8", "1:4"])
@soft_and_hard
@pytest.mark.parametrize(
    ("tau", "scaling", "value_bound", "gradient_bound"),
    [(4.0, 10.0, 1e-6, 1e-5), (1.0, 10.0, 1e-6, 1e-5), (1.0, 100.0, 1e-6, 1e-5), (0.05, 100.0, 1e-4, 2e-4)],
)
def test_float32_error(
    n: int, m: int, hard: bool, tau: float, scaling: float, value_bound: float, gradient_bound: float
) -> None:
    case = Case(n, m, out=96, groups_per_row=64, dtype=torch.float32)
    how = {"tau": tau, "scaling": scaling, "hard": hard}
    exact = case.run(textbook, torch.float64, **how)
    ours = case.run(masked_weight, torch.float32, **how)
    theirs = case.run(textbook, torch.float32, **how)

    def errors(run: tuple[Tensor, ...]) -> list[float]:
        differences = [a.double() - b for a, b in zip(run, exact, strict=True)]
        return [
            largest(differences[0], case.weight),
            norm(differences[2], exact[2]),
            norm(differences[3], exact[3]),
        ]

    value, logit_gradient, weight_gradient = errors(ours)
    assert value <= value_bound
    assert logit_gradient <= gradient_bound
    assert weight_gradient <= gradient_bound
    for found, textbook_error in zip(errors(ours), errors(theirs), strict=True):
        assert found <= 2 * textbook_error
