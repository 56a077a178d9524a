"""The mask operation against the textbook form, in float64 and float32, whichever backend computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from mask_oracle import ANNEALED, FLOAT32_BOUNDS, Case, equal_in_float64, errors, norm, table, textbook
from torch import Tensor

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.utils.rng import philox_key

PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 8), (1, 2)]
every_pattern = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])
soft_and_hard = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])

# What each backend has code of its own for.
CHUNKED = [("chunked", n, m, hard) for n, m in PATTERNS for hard in (False, True)]
EVERY = [*CHUNKED, ("compiled", 2, 4, False)]
every_kind = pytest.mark.parametrize(
    ("backend", "n", "m", "hard"), EVERY, ids=[f"{b}-{n}:{m}-{'hard' if h else 'soft'}" for b, n, m, h in EVERY]
)
every_2_4 = pytest.mark.parametrize(
    ("backend", "hard"),
    [("chunked", False), ("chunked", True), ("compiled", False)],
    ids=["chunked-soft", "chunked-hard", "compiled"],
)


@pytest.fixture(scope="module", autouse=True)
def compiled_afresh() -> Iterator[None]:
    """What was compiled before does not count, and too many compilations are an error, not uncompiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@every_kind
@pytest.mark.parametrize(("tau", "scaling"), ANNEALED)
def test_equals_textbook(backend: str, n: int, m: int, hard: bool, tau: float, scaling: float) -> None:
    case = Case(n, m, out=24)  # some are undecided: were none, the textbook form's gradients would be off by 3e-10
    found = case.drawn(backend, torch.float64, tau=tau, scaling=scaling, hard=hard)
    equal_in_float64(found, case.run(textbook, torch.float64, tau=tau, scaling=scaling, hard=hard))


@every_pattern
@soft_and_hard
def test_without_noise_equals_textbook(n: int, m: int, hard: bool) -> None:
    case, how = Case(n, m), {"tau": 1.0, "scaling": 10.0, "hard": hard, "uniform": None}
    equal_in_float64(case.run(masked_weight, torch.float64, **how), case.run(textbook, torch.float64, **how))


@pytest.mark.parametrize(("n", "m", "hard"), [(2, 4, False), (2, 4, True), (1, 4, False)])
@pytest.mark.parametrize("scalar", [lambda x: torch.tensor(x, dtype=torch.float64), int], ids=["tensors", "integers"])
def test_temperature_and_scaling_in_other_types(n: int, m: int, hard: bool, scalar: Callable[[float], object]) -> None:
    case = Case(n, m)
    found, expected = (
        case.run(masked_weight, torch.float64, tau=kind(2.0), scaling=kind(10.0), hard=hard) for kind in (scalar, float)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_2_4
@pytest.mark.parametrize("part", ["masked", "energy"])
def test_gradient_of_each_output_alone(backend: str, hard: bool, part: str) -> None:
    case, gradients = Case(), []
    for function, how in (
        (masked_weight, {"backend": backend, "key": case.key}),
        (textbook, {"uniform": case.uniform}),
    ):
        logits = case.logits.clone().requires_grad_()
        masked, energy = function(case.weight, logits, case.candidates, tau=1.0, scaling=10.0, hard=hard, **how)
        ((masked * case.upstream).sum() if part == "masked" else energy).backward()
        gradients.append(logits.grad)
    assert norm(gradients[0] - gradients[1], gradients[1]) <= 1e-10


@pytest.mark.parametrize(("backend", "n", "m"), [*(("chunked", *pattern) for pattern in PATTERNS), ("compiled", 2, 4)])
def test_gradcheck(backend: str, n: int, m: int) -> None:
    case = Case(n, m, out=2, groups_per_row=2)

    def function(weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return masked_weight(weight, logits, case.candidates, tau=1.3, scaling=5.0, key=case.key, backend=backend)

    assert torch.autograd.gradcheck(function, (case.weight.requires_grad_(), case.logits.requires_grad_()))


@pytest.mark.parametrize("backend", ["chunked", "compiled"])
def test_second_derivatives_are_refused(backend: str) -> None:
    case = Case()
    masked, _ = masked_weight(
        case.weight, case.logits.requires_grad_(), case.candidates, tau=1.3, scaling=5.0, key=case.key, backend=backend
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(masked.sum(), case.logits, create_graph=True)


@every_pattern
def test_hard_keeps_weights_of_the_most_probable_candidate(n: int, m: int) -> None:
    case = Case(n, m)
    masked, _, _, _ = case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=True)
    scores = 10.0 * case.logits - torch.log(-torch.log(case.uniform))
    mask = case.candidates[scores.argmax(0)].reshape(case.weight.shape)
    assert torch.equal(masked, case.weight * mask)


@every_2_4
def test_frozen_weight_gets_no_gradient(backend: str, hard: bool) -> None:
    case = Case()
    how = {"tau": 1.0, "scaling": 10.0, "hard": hard, "key": case.key, "backend": backend}
    logits = case.logits.requires_grad_()
    masked, _ = masked_weight(case.weight, logits, case.candidates, **how)
    masked.backward(case.upstream)
    assert case.weight.grad is None
    case.grad_energy = 0.0
    del how["key"], how["backend"]
    assert norm(logits.grad - case.drawn(backend, torch.float64, **how)[2], logits.grad) <= 1e-14


@every_2_4
def test_inputs_are_left_alone(backend: str, hard: bool) -> None:
    case = Case()
    tensors = (case.weight, case.logits, case.candidates, case.uniform, torch.from_numpy(case.key.view("int64")))
    before = [t.clone() for t in tensors]
    case.drawn(backend, torch.float64, tau=1.0, scaling=10.0, hard=hard)
    case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=hard)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@every_2_4
@pytest.mark.parametrize("columns", [4, 20])
@pytest.mark.parametrize("view", [lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 2)[..., 0]])
def test_strided_tensors_equal_contiguous_ones(
    columns: int, view: Callable[[Tensor], Tensor], backend: str, hard: bool
) -> None:
    case = Case(groups_per_row=columns // 4)
    expected = case.drawn(backend, torch.float64, tau=1.0, scaling=10.0, hard=hard)
    for name in ("weight", "logits", "uniform", "upstream"):
        setattr(case, name, view(getattr(case, name)))
        assert not getattr(case, name).is_contiguous()
    for found in (
        case.drawn(backend, torch.float64, tau=1.0, scaling=10.0, hard=hard),
        case.run(masked_weight, torch.float64, tau=1.0, scaling=10.0, hard=hard),
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@every_2_4
def test_expanded_gradient(backend: str, hard: bool) -> None:
    case = Case()
    expected = []
    for upstream in (torch.full(case.weight.shape, 0.7, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)):
        logits = case.logits.clone().requires_grad_()
        masked, _ = masked_weight(
            case.weight, logits, case.candidates, tau=1.0, scaling=10.0, hard=hard, key=case.key, backend=backend
        )
        masked.backward(upstream.expand(masked.shape))
        expected.append(logits.grad)
    assert torch.equal(*expected)


@every_2_4
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (5, 7), (17, 1)])
def test_small_and_odd_shapes(shape: tuple[int, int], backend: str, hard: bool) -> None:
    case, how = Case(2, 4, *shape), {"tau": 0.7, "scaling": 5.0, "hard": hard}
    equal_in_float64(case.drawn(backend, torch.float64, **how), case.run(textbook, torch.float64, **how))


@every_kind
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_no_groups(backend: str, n: int, m: int, hard: bool, tau: float) -> None:
    case = Case(n, m, out=0)
    masked, energy, grad_logits, grad_weight = case.drawn(backend, torch.float64, tau=tau, scaling=10.0, hard=hard)
    assert masked.shape == grad_weight.shape == (0, 5 * m)
    assert grad_logits.shape == (len(case.candidates), 0)
    assert float(energy) == 0


@every_kind
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_saturated_logits_are_finite(backend: str, n: int, m: int, hard: bool, size: float, tau: float) -> None:
    case = Case(n, m, dtype=torch.float32)
    case.logits = torch.zeros_like(case.logits)
    chosen = torch.arange(case.logits.shape[1]) % len(case.candidates)
    case.logits[chosen, torch.arange(len(chosen))] = size
    found = case.drawn(backend, torch.float32, tau=tau, scaling=100.0, hard=hard)
    assert all(t.isfinite().all() for t in found)
    if size > 0:  # certain: the mask is that candidate, and nothing pulls any more
        assert torch.equal(found[0], case.weight * case.candidates[chosen].reshape(case.weight.shape))
        assert not found[2].any()
    else:  # impossible: the rest share the probability
        assert not found[2][chosen, torch.arange(len(chosen))].any()


@pytest.mark.parametrize(
    ("backend", "n", "m", "hard", "tau"),
    # The arg-max is the same for every τ; a soft mask shows it where τ is small.
    [*(("chunked", n, m, True, tau) for n, m in PATTERNS for tau in (1.0, 0.5)), ("compiled", 2, 4, False, 0.01)],
)
def test_sampled_frequencies_are_the_softmax(backend: str, n: int, m: int, hard: bool, tau: float) -> None:
    groups, candidates = 20_000, table(n, m)
    logits = torch.linspace(-0.1, 0.1, len(candidates))[torch.randperm(len(candidates))]
    expected = groups * torch.softmax(10.0 * logits.double(), 0)
    chi_square = 0.0
    for seed in range(20):
        masked, _ = masked_weight(
            torch.ones(groups, m),
            logits[:, None].repeat(1, groups),
            candidates,
            tau=tau,
            scaling=10.0,
            hard=hard,
            key=philox_key(seed, "frequencies"),
            backend=backend,
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


@pytest.mark.parametrize(
    ("backend", "n", "m", "hard"),
    [*(("chunked", n, m, hard) for n, m in ((2, 4), (4, 8), (1, 4)) for hard in (False, True)), EVERY[-1]],
)
@pytest.mark.parametrize(("tau", "scaling", "value_bound", "gradient_bound"), FLOAT32_BOUNDS)
def test_float32_error(
    backend: str, n: int, m: int, hard: bool, tau: float, scaling: float, value_bound: float, gradient_bound: float
) -> None:
    case = Case(n, m, out=96, groups_per_row=64, dtype=torch.float32)
    how = {"tau": tau, "scaling": scaling, "hard": hard}
    exact = case.run(textbook, torch.float64, **how)
    found = errors(case.drawn(backend, torch.float32, **how), exact, case.weight)
    theirs = errors(case.run(textbook, torch.float32, **how), exact, case.weight)
    for i, bound in ((0, value_bound), (2, gradient_bound), (3, gradient_bound)):
        assert found[i] <= bound
        assert found[i] <= 2 * theirs[i]


@pytest.mark.parametrize(
    ("backend", "n", "m", "hard", "half"),
    [(*kind, torch.bfloat16) for kind in EVERY] + [(*kind, torch.float16) for kind in CHUNKED[:4]],
)
def test_sixteen_bits_are_computed_in_32(backend: str, n: int, m: int, hard: bool, half: torch.dtype) -> None:
    case = Case(n, m, out=96, groups_per_row=64, dtype=torch.float32)
    for name in ("weight", "logits", "upstream"):
        setattr(case, name, getattr(case, name).to(half).float())
    how = {"tau": 0.7, "scaling": 10.3, "hard": hard}  # which 16 bits do not hold
    exact, found = case.run(textbook, torch.float64, **how), case.drawn(backend, half, **how)
    unit = torch.finfo(half).eps
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.51 * unit, atol=1e-6)
    assert float(found[1]) == pytest.approx(float(exact[1]), rel=1e-6)  # of the values before they are rounded
    assert all(norm(a.double() - b, b) <= unit for a, b in zip(found[2:], exact[2:], strict=True))
