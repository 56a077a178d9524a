"""What logits stand for: masks, first logits, numbers and chances of both gates."""

from __future__ import annotations

import pytest
import torch
from mask_oracle import table
from torch import Tensor, nn

from maskllm4v import LearnableMaskedLinear, current_masks, dense_weight, make_learnable
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameterization import GATES, CandidateGate, MaskParameterization, PositionGate, gate_of
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.surgery import set_noise_key
from maskllm4v.utils.errors import ConfigError, PatternError

PATTERNS = [(2, 4), (4, 8), (2, 8), (3, 5), (1, 4), (16, 17)]
every_pattern = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])
both = pytest.mark.parametrize("gate", GATES)


def masks_of(gate: MaskParameterization, logits: Tensor) -> Tensor:
    return gate.mask(logits, gate.candidates(logits.device, logits.dtype))


@pytest.mark.parametrize(("n", "m", "candidates"), [(2, 4, 6), (4, 8, 70), (2, 8, 28), (1, 4, 4)])
def test_logits_a_group(n: int, m: int, candidates: int) -> None:
    for gate, logits in (("candidates", candidates), ("positions", m)):
        assert LearnableMaskedLinear(16, 6, N=n, M=m, gate=gate).logits.shape == (logits, 96 // m)


def test_unknown_gate() -> None:
    with pytest.raises(ConfigError, match="gate is 'weights'; allowed: candidates, positions"):
        make_learnable(nn.Sequential(nn.Linear(8, 4)), None, pattern="2:4", gate="weights")


# Where one position is kept, it is the candidate


@pytest.mark.parametrize("init", ["prior", "magnitude"])
@pytest.mark.parametrize("hard", [False, True])
def test_one_of_m_is_the_same_layer(init: str, hard: bool) -> None:
    found = []
    for gate in GATES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 6))
        masks = {"0": NMPattern("1:4").topn_mask(torch.randn(6, 16))}
        make_learnable(model, masks, pattern="1:4", init=init, hard=hard, gate=gate, seed=3).train()
        set_noise_key(model, NoiseKey(step=5))
        model[0].tau = 0.7
        output = model(torch.randn(3, 16))
        output.square().sum().backward()
        found.append((model[0].logits, output, model[0].logits.grad, model[0].current_mask()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_gates_of_one_of_m_agree() -> None:
    pattern, logits, weight = NMPattern("1:4"), torch.randn(4, 60, dtype=torch.float64), torch.randn(15, 16)
    mask = pattern.topn_mask(torch.randn(15, 16))
    a, b = CandidateGate(pattern), PositionGate(pattern)
    assert torch.equal(masks_of(a, logits), masks_of(b, logits))
    assert torch.equal(a.shift(mask), b.shift(mask))
    assert torch.equal(a.magnitude(weight), b.magnitude(weight))
    torch.testing.assert_close(a.max_probability(logits), b.max_probability(logits), rtol=1e-12, atol=0)


# A candidate's logit is the sum over the positions that it keeps


@every_pattern
def test_prior_and_magnitude_are_those_of_the_candidates(n: int, m: int) -> None:
    pattern, weight = NMPattern(n, m), torch.randn(6, 5 * m, dtype=torch.float64)
    mask, masks = pattern.topn_mask(torch.randn(6, 5 * m)), table(n, m, torch.float64)
    by_candidate, by_position = CandidateGate(pattern), PositionGate(pattern)
    for logits, sums in (
        (by_candidate.shift(mask), masks.float() @ by_position.shift(mask)),
        (by_candidate.magnitude(weight), masks @ by_position.magnitude(weight)),
    ):
        torch.testing.assert_close(sums, logits, rtol=0, atol=1e-6)


@every_pattern
def test_chance_and_mask_are_those_of_the_sums(n: int, m: int) -> None:
    pattern, logits = NMPattern(n, m), torch.randn(m, 40, dtype=torch.float64)
    sums = table(n, m, torch.float64) @ logits
    by_candidate, by_position = CandidateGate(pattern), PositionGate(pattern)
    assert torch.equal(masks_of(by_position, logits), masks_of(by_candidate, sums))
    torch.testing.assert_close(
        by_position.max_probability(logits), by_candidate.max_probability(sums), rtol=1e-12, atol=0
    )


# Masks and their numbers


@both
@every_pattern
def test_index_is_that_of_the_mask(n: int, m: int, gate: str) -> None:
    found = gate_of(gate, NMPattern(n, m))
    logits = torch.randn(found.logits, 200)
    assert torch.equal(found.index(logits), NMPattern(n, m).to_index(masks_of(found, logits)))


def test_too_many_candidates_are_refused() -> None:
    with pytest.raises(PatternError, match=r"8:16 has 12870 candidate masks a group; .*`gate=.positions.`$"):
        LearnableMaskedLinear(16, 6, N=8, M=16)
    assert LearnableMaskedLinear(16, 6, N=8, M=16, gate="positions").logits.shape == (16, 6)


@both
def test_equal_logits_mean_the_first_mask(gate: str) -> None:
    found = gate_of(gate, NMPattern("2:4"))
    assert masks_of(found, torch.zeros(found.logits, 2)).tolist() == [[True, True, False, False]] * 2


# First logits


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_strong_prior_is_the_first_mask(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(256, 32))
    masks = {"0": NMPattern(pattern).topn_mask(torch.randn(32, 256))}
    make_learnable(model, masks, pattern=pattern, gate="positions", prior_strength=50.0)
    assert torch.equal(current_masks(model)["0"], masks["0"])
    logits = learnable_masks(model)["0"].logits.detach()
    assert float(logits.mean()) == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:8"])
def test_magnitude_start_is_the_magnitude_mask(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(512, 256))
    make_learnable(model, None, pattern=pattern, init="magnitude", gate="positions")
    assert torch.equal(current_masks(model)["0"], NMPattern(pattern).topn_mask(dense_weight(model[0]).detach().abs()))


@pytest.mark.parametrize(
    "group",
    [
        [1.0, 1e-5, 2e-5, 3e-5],
        [1e-25, 2e-25, 4e-25, 3e-25],
        [1.0, 1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 1e-30, 2e-30, 3e-30],
    ],
    ids=["wide", "tiny", "equal", "zero", "rounded to zero"],
)
@pytest.mark.parametrize("flushed", [False, True], ids=["", "no subnormals"])
def test_magnitude_start_survives_rounding(group: list[float], flushed: bool) -> None:
    """Where CPUs take subnormal numbers for zero, as in trainings, too."""
    weight, gate = torch.tensor([group]), PositionGate(NMPattern("2:4"))
    torch.set_flush_denormal(flushed)
    try:
        logits = gate.magnitude(weight)
        found = gate.mask(logits)
    finally:
        torch.set_flush_denormal(False)
    assert logits.isfinite().all()
    assert torch.equal(found, NMPattern("2:4").topn_mask(weight.abs()))


# Learning


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16"])
def test_optimising_logits_finds_the_mask(pattern: str, hard: bool) -> None:
    """Of weights that answer alone where they are wanted, and are twice as large where they are not."""
    parts = NMPattern(pattern)
    wanted = parts.topn_mask(torch.randn(4, 16))
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    model[0].weight.data = torch.where(wanted, 1.0, 2.0) * torch.randn(4, 16).sign()
    answer = model[0].weight.detach() * wanted
    make_learnable(model, None, pattern=pattern, hard=hard, gate="positions").train()
    optimizer = torch.optim.Adam([model[0].logits], lr=0.1)
    for step in range(150):
        set_noise_key(model, NoiseKey(step=step))
        model[0].tau, model[0].scaling = 4.0 - 0.026 * step, 10.0
        x = torch.randn(64, 16)
        (model(x) - x @ answer.t()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].current_mask(), wanted)
