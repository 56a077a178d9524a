"""Layers whose masks are learned: logits, noise, gradients, what they save."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v import LearnableMaskedLinear, MaskedLinear, dense_weight
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.surgery import set_noise_key
from maskllm4v.utils.rng import philox_key, uniforms

either_class = pytest.mark.parametrize("layer_class", [MaskedLinear, LearnableMaskedLinear])


@pytest.mark.parametrize(("n", "m", "candidates"), [(2, 4, 6), (1, 4, 4), (4, 8, 70), (1, 2, 2)])
def test_logits_shape(n: int, m: int, candidates: int) -> None:
    assert LearnableMaskedLinear(16, 6, N=n, M=m).logits.shape == (candidates, 96 // m)


@pytest.mark.parametrize("std", [0.2, 0.01])
def test_initial_logits_are_normal(std: float) -> None:
    logits = LearnableMaskedLinear(256, 64, gate_std=std).logits.detach()  # 24,576 values
    assert abs(float(logits.mean())) < 4 * std / math.sqrt(logits.numel())
    assert float(logits.std()) == pytest.approx(std, rel=0.02)
    assert float((logits.abs() < std).float().mean()) == pytest.approx(0.6827, abs=0.012)


def test_initial_logits_depend_on_seed_and_name_only() -> None:
    def logits(**how: object) -> Tensor:
        torch.rand(1)  # moves torch's generator on
        return LearnableMaskedLinear(8, 6, **how).logits

    first = logits(name="a", seed=1)
    assert torch.equal(logits(name="a", seed=1, hard=True, tau=2.0), first)
    assert not torch.equal(logits(name="b", seed=1), first)
    assert not torch.equal(logits(name="a", seed=2), first)
    assert torch.equal(LearnableMaskedLinear.from_linear(nn.Linear(8, 6), name="a", seed=1).logits, first)


def test_no_gate_std_no_noise_in_logits() -> None:
    assert not LearnableMaskedLinear(8, 6, gate_std=0.0).logits.any()


@pytest.mark.parametrize("bias", [True, False])
def test_only_logits_are_trained(bias: bool) -> None:
    layer = LearnableMaskedLinear(8, 6, bias)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight_mask.logits"]
    layer(torch.randn(3, 8)).sum().backward()
    assert dense_weight(layer).grad is None
    assert layer.logits.grad.any()


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("group", range(2))
@pytest.mark.parametrize(("candidate", "kept"), [(0, (0, 1)), (2, (0, 3)), (4, (1, 3)), (5, (2, 3))])
def test_groups_are_row_major(row: int, group: int, candidate: int, kept: tuple[int, int]) -> None:
    layer = LearnableMaskedLinear(8, 3, gate_std=0.0)
    with torch.no_grad():
        layer.logits[1] = 1e4  # everywhere else (0, 2)
        layer.logits[1, row * 2 + group] = 0
        layer.logits[candidate, row * 2 + group] = 1e4
    expected = torch.tensor([1, 0, 1, 0] * 2).repeat(3, 1).bool()
    expected[row, group * 4 : group * 4 + 4] = torch.tensor([j in kept for j in range(4)])
    assert torch.equal(layer.current_mask(), expected)
    masked, _ = layer.masked_weight()
    assert torch.equal(masked, dense_weight(layer) * expected)


def test_eval_uses_the_most_probable_mask() -> None:
    layer = LearnableMaskedLinear(8, 6).eval()
    kept = [[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)][k] for k in layer.logits.argmax(0).tolist()]
    mask = torch.tensor([[j in group for j in range(4)] for group in kept]).reshape(6, 8)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), F.linear(x, dense_weight(layer) * mask, layer.bias))
    assert torch.equal(layer(x), layer(x))


def test_equal_logits_go_to_the_first_candidate() -> None:
    layer = LearnableMaskedLinear(8, 3, gate_std=0.0)
    assert torch.equal(layer.current_mask(), torch.tensor([1, 1, 0, 0] * 2).repeat(3, 1).bool())


def test_each_training_forward_draws_anew() -> None:
    layer, x = LearnableMaskedLinear(16, 6), torch.randn(3, 16)
    outputs = [layer(x) for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[2])


def test_runs_repeat_without_saved_state() -> None:
    x = torch.randn(3, 16)
    linear = nn.Linear(16, 6)
    first, second = (LearnableMaskedLinear.from_linear(linear, name="a", seed=3) for _ in range(2))
    for _ in range(3):
        expected = first(x)
        torch.rand(5)
        assert torch.equal(second(x), expected)


def test_set_noise_key_fixes_the_noise() -> None:
    layer, x = LearnableMaskedLinear(16, 6, name="a"), torch.randn(3, 16)
    set_noise_key(nn.Sequential(layer), NoiseKey(seed=1, step=2))
    output = layer(x)
    assert torch.equal(layer(x), output)
    set_noise_key(layer, NoiseKey(seed=1, step=3))
    assert not torch.equal(layer(x), output)
    set_noise_key(layer, NoiseKey(seed=1, step=2))
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("field", ["seed", "step", "micro_step", "rank"])
def test_every_part_of_the_draw_counts(field: str) -> None:
    layer, x = LearnableMaskedLinear(16, 6), torch.randn(3, 16)
    set_noise_key(layer, NoiseKey())
    output = layer(x)
    set_noise_key(layer, NoiseKey(**{field: 1}))
    assert not torch.equal(layer(x), output)


def test_name_counts_for_the_noise() -> None:
    linear, x = nn.Linear(16, 6), torch.randn(3, 16)
    first, second = (LearnableMaskedLinear.from_linear(linear, name=name, gate_std=0.0) for name in "ab")
    assert not torch.equal(first(x), second(x))


def test_noise_is_keyed_by_seed_name_step_micro_step_rank() -> None:
    layer = LearnableMaskedLinear(16, 6, name="blocks.0.fc", scaling=5.0)
    set_noise_key(layer, NoiseKey(seed=1, step=2, micro_step=3, rank=4))
    noise = uniforms(philox_key(1, "gumbel", "blocks.0.fc", 2, 3, 4), 0, 6, 24)
    assert torch.equal(layer.masked_weight()[0], layer.masked_weight(noise)[0])


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("tau", "scaling"), [(1, 100), (4.0, 10.0), (0.05, 100.0)])
def test_masked_weight_of_given_noise(hard: bool, tau: float, scaling: float) -> None:
    layer = LearnableMaskedLinear(8, 3, hard=hard, tau=tau, scaling=scaling).double()
    uniform = uniforms(philox_key(9), 0, 6, 6).double()
    masked, energy = layer.masked_weight(uniform)
    kept = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = torch.zeros_like(dense_weight(layer))
    for row in range(3):
        for group in range(2):
            g = row * 2 + group
            z = [
                (scaling * float(layer.logits[k, g].detach()) - math.log(-math.log(float(uniform[k, g])))) / tau
                for k in range(6)
            ]
            p = [math.exp(value - max(z)) for value in z]
            p = [float(value == max(p)) for value in p] if hard else [value / sum(p) for value in p]
            for k in range(6):
                for j in kept[k]:
                    expected[row, group * 4 + j] += p[k] * dense_weight(layer)[row, group * 4 + j]
    assert masked.shape == (3, 8)
    assert float((masked - expected).detach().abs().max()) <= 1e-12
    assert energy.shape == ()
    assert float(energy.detach()) == pytest.approx(float(expected.square().sum()), rel=1e-12)


def test_kept_energy_of_the_last_forward() -> None:
    layer = LearnableMaskedLinear(8, 6)
    assert layer.kept_energy is None
    set_noise_key(layer, NoiseKey())
    layer(torch.randn(3, 8))
    masked, _ = layer.masked_weight()
    torch.testing.assert_close(layer.kept_energy, masked.square().sum())
    layer.kept_energy.backward()
    assert layer.logits.grad.any()


def test_hard_training_forward_keeps_exactly_n() -> None:
    layer = LearnableMaskedLinear(16, 6, hard=True, scaling=1.0)
    masked, _ = layer.masked_weight()
    assert NMPattern("2:4").is_valid((masked != 0).to(torch.uint8))


@pytest.mark.parametrize("attribute", ["tau", "scaling"])
class TestTemperatureAndScaling:
    def test_take_numbers(self, attribute: str) -> None:
        layer = LearnableMaskedLinear(8, 6, **{attribute: 2})
        assert getattr(layer, attribute) == 2.0
        setattr(layer, attribute, 0.05)
        assert getattr(layer, attribute) == 0.05
        assert isinstance(getattr(layer, attribute), float)

    @pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, -math.inf])
    def test_refuse_what_is_not_positive(self, attribute: str, value: float) -> None:
        layer = LearnableMaskedLinear(8, 6)
        before = getattr(layer, attribute)
        with pytest.raises(ValueError, match=attribute):
            setattr(layer, attribute, value)
        with pytest.raises(ValueError, match=attribute):
            LearnableMaskedLinear(8, 6, **{attribute: value})
        assert getattr(layer, attribute) == before

    def test_change_the_output(self, attribute: str) -> None:
        layer, x = LearnableMaskedLinear(8, 6, tau=1.0, scaling=5.0), torch.randn(3, 8)
        set_noise_key(layer, NoiseKey())
        output = layer(x)
        setattr(layer, attribute, 2.0)
        assert not torch.allclose(layer(x), output)


def test_logits_round_trip_by_state_dict() -> None:
    layer, other = LearnableMaskedLinear(8, 6, name="a"), LearnableMaskedLinear(8, 6, name="b")
    assert sorted(layer.state_dict()) == ["bias", "weight", "weight_mask.logits"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(other.eval()(x), layer.eval()(x))


def test_missing_logits_are_reported() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_mask\.logits"'):
        LearnableMaskedLinear(8, 6).load_state_dict(nn.Linear(8, 6).state_dict())
