"""The Triton kernels against the textbook form in float64, under Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_case import CANDIDATES, KEY, KernelCase, fused, same
from mask_oracle import FLOAT32_BOUNDS, errors, norm

from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.utils.rng import philox_key

pytest_plugins = ["interpreted_triton"]
soft_and_hard = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])


@soft_and_hard
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize(("tau", "scaling", "value_bound", "gradient_bound"), FLOAT32_BOUNDS)
@pytest.mark.usefixtures("large_programs")
def test_error(
    tau: float,
    scaling: float,
    value_bound: float,
    gradient_bound: float,
    noise: bool,
    hard: bool,
    device: torch.device,
) -> None:
    case = KernelCase(6000)
    sampling = Sampling(tau, scaling, hard, uniform=case.uniform if noise else None)
    exact = case.textbook(sampling)
    found = errors(case.kernels(sampling, device), exact, case.weight)
    for error, bound in zip(found, (value_bound, value_bound, gradient_bound, gradient_bound), strict=True):
        assert error <= bound
    theirs = errors(case.textbook(sampling, torch.float32), exact, case.weight)
    exponential = 2.0**-23 if device.type == "cuda" else 0.0  # a GPU's fast 2ˣ is off by up to two units
    for i in (0, 2, 3):  # the energy is a single number, right by accident or not
        assert found[i] <= 2 * theirs[i] + exponential


@soft_and_hard
@pytest.mark.parametrize("groups", [1, 2, 7, 255, 256, 257, 700])
def test_any_number_of_groups(groups: int, hard: bool, device: torch.device) -> None:
    case = KernelCase(groups)
    sampling = Sampling(0.8, 10.0, hard, uniform=case.uniform)
    found = errors(case.kernels(sampling, device), case.textbook(sampling), case.weight)
    assert max(found[:2]) <= 2e-6
    assert max(found[2:]) <= 1e-5


def test_no_groups(device: torch.device) -> None:
    case = KernelCase(0)
    masked, energy, grad_logits, grad_weight = case.kernels(Sampling(1.0, 10.0, key=KEY), device)
    assert masked.shape == grad_weight.shape == (0, 4)
    assert grad_logits.shape == (6, 0)
    assert float(energy) == 0
    assert fused.uniforms(KEY, 6, 0, device).shape == (6, 0)


@pytest.mark.parametrize("part", ["masked", "energy"])
@soft_and_hard
def test_gradient_of_each_output_alone(part: str, hard: bool, device: torch.device) -> None:
    case = KernelCase(64)
    if part == "masked":
        case.grad_energy = 0.0
    else:
        case.upstream.zero_()
    sampling = Sampling(1.0, 10.0, hard, uniform=case.uniform)
    found = errors(case.kernels(sampling, device), case.textbook(sampling), case.weight)
    assert max(found[2:]) <= 1e-5


def test_frozen_weight_gets_no_gradient(device: torch.device) -> None:
    case = KernelCase(64)
    sampling = Sampling(1.0, 10.0, key=KEY)
    frozen = case.kernels(sampling, device, weight_grad=False)
    assert len(frozen) == 3
    same(frozen, case.kernels(sampling, device)[:3])


def test_inputs_are_left_alone(device: torch.device) -> None:
    case = KernelCase(64)
    names = ("weight", "logits", "uniform", "upstream")
    for name in names:
        setattr(case, name, getattr(case, name).to(device))
    before = [getattr(case, name).clone() for name in names]
    case.kernels(Sampling(1.0, 10.0, uniform=case.uniform), device)
    for name, then in zip(names, before, strict=True):
        assert torch.equal(getattr(case, name), then)


def test_equal_candidates_go_to_the_first(device: torch.device) -> None:
    case = KernelCase(64)
    for first in range(6):
        case.logits = torch.where(torch.arange(6) < first, -1.0, 2.0)[:, None].repeat(1, 64)
        masked = case.kernels(Sampling(1.0, 10.0, hard=True), device)[0]
        assert torch.equal(masked, case.weight * CANDIDATES[first])


@soft_and_hard
@pytest.mark.parametrize("tau", [1.0, 0.05])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_saturated_logits_are_finite(size: float, tau: float, hard: bool, device: torch.device) -> None:
    case = KernelCase(60)
    chosen = torch.arange(60) % 6
    case.logits = torch.zeros(6, 60)
    case.logits[chosen, torch.arange(60)] = size
    masked, energy, grad_logits, grad_weight = case.kernels(Sampling(tau, 100.0, hard, key=KEY), device)
    assert all(t.isfinite().all() for t in (masked, energy, grad_logits, grad_weight))
    if size > 0:  # certain: the mask is that candidate, and nothing pulls any more
        torch.testing.assert_close(masked, case.weight * CANDIDATES[chosen], rtol=1e-6, atol=0)
        pull = (case.upstream.abs() + case.weight.abs()).max() * case.weight.abs().max()
        assert float(grad_logits.abs().max()) <= 1e-6 * 100.0 / tau * float(pull)
    else:  # impossible: the rest share the probability
        assert not grad_logits[chosen, torch.arange(60)].any()


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_extreme_noise_is_finite(tau: float, device: torch.device) -> None:
    case = KernelCase(64)
    extremes = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-40, 1.0], dtype=torch.float64)
    case.uniform = extremes[torch.randint(0, 6, (6, 64))]
    case.uniform[:, :6] = extremes  # the same for all candidates: as good as none
    found = case.kernels(Sampling(tau, 10.0, uniform=case.uniform), device)
    assert all(t.isfinite().all() for t in found)
    without = case.kernels(Sampling(tau, 10.0), device)
    torch.testing.assert_close(found[0][:6], without[0][:6], rtol=1e-5, atol=1e-6)


# Types, strides, what is supported


@pytest.mark.parametrize("noise_dtype", [torch.float64, torch.float16])
def test_uniform_of_any_float_type(noise_dtype: torch.dtype, device: torch.device) -> None:
    case = KernelCase(64)
    uniform = case.uniform.clamp(0.01, 0.99).to(noise_dtype)
    found = case.kernels(Sampling(1.0, 10.0, uniform=uniform), device)
    expected = case.kernels(Sampling(1.0, 10.0, uniform=uniform.float()), device)
    same(found, expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["autocast", "weight", "logits", "everything"])
@soft_and_hard
def test_sixteen_bits(what: str, half: torch.dtype, hard: bool, device: torch.device) -> None:
    case = KernelCase(300)
    case.upstream = case.upstream.to(half)
    if what in ("weight", "everything"):
        case.weight = case.weight.to(half)
    if what in ("logits", "everything"):
        case.logits = case.logits.to(half)
    sampling = Sampling(1.0, 10.0, hard, uniform=case.uniform)
    exact, found = case.textbook(sampling), case.kernels(sampling, device, half)
    unit = torch.finfo(half).eps  # the interpreter cuts bits off; a GPU rounds, to half of it
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1.01 * unit, atol=1e-6)
    assert float(found[1]) == pytest.approx(float(exact[1]), rel=1e-6)  # of the values before they are rounded
    for gradient, reference, rounded in ((2, exact[2], case.logits), (3, exact[3], case.weight)):
        bound = 1e-5 if rounded.dtype is torch.float32 else unit
        assert norm(found[gradient].double() - reference, reference) <= bound


@soft_and_hard
def test_strided_tensors_equal_contiguous_ones(hard: bool, device: torch.device) -> None:
    case = KernelCase(128)
    how = {"tau": 1.0, "scaling": 10.0, "hard": hard}
    expected = case.kernels(Sampling(**how, uniform=case.uniform), device)
    for view in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 2)[..., 0]):
        strided = KernelCase(128)
        for name in ("weight", "logits", "uniform", "upstream"):
            setattr(strided, name, view(getattr(case, name).to(device)))
            assert not getattr(strided, name).is_contiguous()
        same(strided.kernels(Sampling(**how, uniform=strided.uniform), device), expected)


def test_expanded_gradient(device: torch.device) -> None:
    case, sampling = KernelCase(64), Sampling(1.0, 10.0, key=KEY)
    case.upstream = torch.full((64, 4), 0.7)
    expected = case.kernels(sampling, device)
    case.upstream = torch.tensor(0.7).expand(64, 4)
    same(case.kernels(sampling, device), expected)


def test_unaligned_tensors(device: torch.device) -> None:
    case, sampling = KernelCase(65), Sampling(1.0, 10.0, key=KEY)
    expected = case.kernels(sampling, device)
    for name in ("weight", "logits", "upstream"):
        t = getattr(case, name).to(device)
        setattr(case, name, torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape))
    same(case.kernels(sampling, device), expected)


def test_what_is_supported(device: torch.device) -> None:
    case, sampling = KernelCase(8), Sampling(1.0, 10.0)
    weight, logits, candidates = (t.to(device) for t in (case.weight, case.logits, CANDIDATES))
    assert fused.supported(weight.bfloat16(), logits.half(), candidates, sampling)
    assert not fused.supported(weight.double(), logits, candidates, sampling)
    assert not fused.supported(weight, logits.double(), candidates, sampling)
    assert not fused.supported(weight, logits.to("meta"), candidates, sampling)
    assert not fused.supported(weight.view(-1, 2), logits[:2].repeat(1, 2), torch.eye(2, device=device), sampling)
    assert fused.supported(weight, logits, candidates, Sampling(1.0, 10.0, uniform=case.uniform.to(device)))
    assert not fused.supported(weight, logits, candidates, Sampling(1.0, 10.0, uniform=case.uniform.to("meta")))


@soft_and_hard
@pytest.mark.parametrize("noise", ["drawn", "given"])
def test_joined_layers_are_what_they_are_alone(noise: str, hard: bool, device: torch.device) -> None:
    """One launch for all; programs end where a layer ends."""
    sizes = (300, 1, 256, 257, 700)
    keys = [tuple(map(int, philox_key(seed, "layer"))) for seed in range(len(sizes))]
    keys[1] = (2**63, 2**64 - 1)  # no signed integers
    whole = KernelCase(sum(sizes))
    given = whole.uniform if noise == "given" else None
    how = {"tau": 0.7, "scaling": 10.0, "hard": hard}
    masked, energy, *gradients = whole.kernels(
        Sampling(**how, uniform=given, joined=tuple(zip(sizes, keys, strict=True))), device
    )
    start, energies = 0, 0.0
    for size, key in zip(sizes, keys, strict=True):
        own = slice(start, start + size)
        part = KernelCase(size)
        part.weight, part.logits, part.upstream = whole.weight[own], whole.logits[:, own], whole.upstream[own]
        alone = Sampling(**how, key=key, uniform=None if given is None else given[:, own])
        expected = part.kernels(alone, device)
        same([masked[own], gradients[0][:, own], gradients[1][own]], [expected[0], *expected[2:]])
        start, energies = start + size, energies + float(expected[1])
    assert float(energy) == pytest.approx(energies, rel=1e-5)
