"""Masked layers: what they compute, what they refuse, what they save."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v import LearnableMaskedLinear, MaskedLinear
from maskllm4v.errors import CheckpointError, PatternError
from maskllm4v.layers import Draw
from maskllm4v.patterns import NMPattern
from maskllm4v.randomness import philox_key, uniforms
from maskllm4v.surgery import set_draw

either_class = pytest.mark.parametrize("layer_class", [MaskedLinear, LearnableMaskedLinear])


def random_mask(layer: nn.Linear, n: int = 2, m: int = 4) -> Tensor:
    return NMPattern(n, m).topn_mask(torch.randn_like(layer.weight))


@pytest.fixture
def masked() -> MaskedLinear:
    layer = MaskedLinear(8, 6)
    layer.set_mask(random_mask(layer))
    return layer


# Fixed masks


@pytest.mark.parametrize("use", [lambda layer: layer(torch.ones(1, 8)), lambda layer: layer.fold()])
def test_missing_mask_raises(use: Callable[[MaskedLinear], object]) -> None:
    with pytest.raises(PatternError, match="no mask"):
        use(MaskedLinear(8, 6))


def test_dense_state_dict_does_not_make_it_dense() -> None:
    layer = MaskedLinear(8, 6)
    layer.load_state_dict(nn.Linear(8, 6).state_dict(), strict=False)
    with pytest.raises(PatternError, match="no mask"):
        layer(torch.ones(1, 8))


def test_dense_state_dict_leaves_a_mask_in_place(masked: MaskedLinear) -> None:
    mask = masked.current_mask().clone()
    dense = nn.Linear(8, 6)
    masked.load_state_dict(dense.state_dict(), strict=False)
    x = torch.randn(3, 8)
    assert torch.equal(masked(x), F.linear(x, dense.weight * mask, dense.bias))


def test_strict_load_reports_missing_mask() -> None:
    model = nn.Sequential(nn.Linear(8, 8), MaskedLinear(8, 6))
    state = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.mask"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["1.mask"]


def test_state_dict_round_trip(masked: MaskedLinear) -> None:
    x = torch.randn(3, 8)
    fresh, other = MaskedLinear(8, 6), MaskedLinear(8, 6)
    other.set_mask(~masked.current_mask())
    for layer in (fresh, other):
        result = layer.load_state_dict(masked.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert layer.current_mask().dtype is torch.bool
        assert torch.equal(layer.current_mask(), masked.current_mask())
        assert torch.equal(layer(x), masked(x))


def test_loaded_mask_is_no_alias(masked: MaskedLinear) -> None:
    layer = MaskedLinear(8, 6)
    layer.load_state_dict(masked.state_dict())
    layer.current_mask().logical_not_()
    assert not torch.equal(layer.current_mask(), masked.current_mask())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 4, dtype=torch.bool), r"\(6, 4\).*\(6, 8\)"),
        (torch.ones(48, dtype=torch.bool), r"\(48,\).*\(6, 8\)"),
        (torch.ones(6, 8, dtype=torch.bool), "group 0 of row 0 keeps 4 of 4"),
        (torch.zeros(6, 8, dtype=torch.bool), "group 0 of row 0 keeps 0 of 4"),
        (torch.tensor([1, 0, 0, 0] * 2).repeat(6, 1), "group 0 of row 0 keeps 1 of 4"),
        (torch.tensor([2.0, 0, 0, 0] * 2).repeat(6, 1), "other than 0 and 1"),
    ],
    ids=["narrow", "flat", "ones", "zeros", "1:4", "values"],
)
def test_set_mask_refuses(mask: Tensor, message: str) -> None:
    layer = MaskedLinear(8, 6)
    with pytest.raises(PatternError, match=f"'fc1'.*{message}"):
        layer.set_mask(mask, "fc1")
    assert layer.mask is None


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(6, 4, dtype=torch.bool), CheckpointError),
        (torch.ones(6, 8, dtype=torch.bool), PatternError),
    ],
    ids=["shape", "pattern"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_load_refuses_a_bad_mask(mask: Tensor, error: type[Exception], strict: bool) -> None:
    model = nn.Sequential(nn.Identity(), MaskedLinear(8, 6))
    state = {"1.weight": torch.ones(6, 8), "1.bias": torch.ones(6), "1.mask": mask}
    with pytest.raises(error, match="layer '1'"):
        model.load_state_dict(state, strict=strict)
    assert model[1].mask is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_set_mask_takes_any_zeros_and_ones(dtype: torch.dtype) -> None:
    layer = MaskedLinear(8, 6)
    mask = random_mask(layer)
    layer.set_mask(mask.to(dtype))
    assert layer.current_mask().dtype is torch.bool
    assert torch.equal(layer.current_mask(), mask)


@pytest.mark.parametrize("bias", [True, False])
def test_masked_forward(bias: bool) -> None:
    layer = MaskedLinear(8, 6, bias, N=1, M=8)
    layer.set_mask(random_mask(layer, 1, 8))
    x = torch.randn(2, 3, 8)
    weight = torch.where(layer.current_mask(), layer.weight, torch.zeros(()))
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))


def test_masked_weights_get_no_gradient(masked: MaskedLinear) -> None:
    masked(torch.randn(3, 8)).square().sum().backward()
    assert not masked.weight.grad[~masked.current_mask()].any()
    assert masked.weight.grad[masked.current_mask()].all()


# Both kinds


@either_class
def test_misfit_raises(layer_class: type[nn.Linear]) -> None:
    with pytest.raises(PatternError, match=r"10 input features"):
        layer_class(10, 4)


@either_class
def test_bad_pattern_raises(layer_class: type[nn.Linear]) -> None:
    with pytest.raises(PatternError, match="4:2"):
        layer_class(8, 4, N=4, M=2)


@either_class
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_from_linear_shares_parameters(layer_class: type, bias: bool, training: bool) -> None:
    linear = nn.Linear(8, 6, bias).train(training)
    state = torch.get_rng_state()
    layer = layer_class.from_linear(linear, N=1, M=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.pattern == NMPattern("1:4")
    assert layer.training is training
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


def make(layer_class: type[nn.Linear], bias: bool = True) -> MaskedLinear | LearnableMaskedLinear:
    layer = layer_class(8, 6, bias)
    if isinstance(layer, MaskedLinear):
        layer.set_mask(random_mask(layer))
    return layer


@either_class
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_fold_equals_forward(layer_class: type[nn.Linear], bias: bool, training: bool) -> None:
    layer = make(layer_class, bias).train(training)
    folded = layer.fold()
    assert type(folded) is nn.Linear
    assert folded.training is training
    assert NMPattern("2:4").is_valid((folded.weight != 0).to(torch.uint8))
    assert not torch.signbit(folded.weight[folded.weight == 0]).any()  # no −0 where a weight was negative
    assert (folded.bias is None) is not bias
    x = torch.randn(3, 8)
    assert torch.equal(folded(x), layer.eval()(x))


@either_class
def test_fold_leaves_the_dense_weight(layer_class: type[nn.Linear]) -> None:
    layer = make(layer_class)
    before = layer.weight.detach().clone()
    layer.fold().weight.data.zero_()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("trainable", [True, False])
def test_fold_keeps_requires_grad(masked: MaskedLinear, trainable: bool) -> None:
    masked.weight.requires_grad_(trainable)
    assert masked.fold().weight.requires_grad is trainable


@either_class
def test_deepcopy_computes_the_same(layer_class: type[nn.Linear]) -> None:
    layer = make(layer_class).eval()
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@either_class
def test_repr_shows_the_pattern(layer_class: type[nn.Linear]) -> None:
    assert "pattern=2:4" in repr(layer_class(8, 6))


# Learnable masks


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
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["logits"]
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is None
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
    assert torch.equal(masked, layer.weight * expected)


def test_eval_uses_the_most_probable_mask() -> None:
    layer = LearnableMaskedLinear(8, 6).eval()
    kept = [[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)][k] for k in layer.logits.argmax(0).tolist()]
    mask = torch.tensor([[j in group for j in range(4)] for group in kept]).reshape(6, 8)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight * mask, layer.bias))
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


def test_set_draw_fixes_the_noise() -> None:
    layer, x = LearnableMaskedLinear(16, 6, name="a"), torch.randn(3, 16)
    set_draw(nn.Sequential(layer), Draw(seed=1, step=2))
    output = layer(x)
    assert torch.equal(layer(x), output)
    set_draw(layer, Draw(seed=1, step=3))
    assert not torch.equal(layer(x), output)
    set_draw(layer, Draw(seed=1, step=2))
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("field", ["seed", "step", "micro_step", "rank"])
def test_every_part_of_the_draw_counts(field: str) -> None:
    layer, x = LearnableMaskedLinear(16, 6), torch.randn(3, 16)
    set_draw(layer, Draw())
    output = layer(x)
    set_draw(layer, Draw(**{field: 1}))
    assert not torch.equal(layer(x), output)


def test_name_counts_for_the_noise() -> None:
    linear, x = nn.Linear(16, 6), torch.randn(3, 16)
    first, second = (LearnableMaskedLinear.from_linear(linear, name=name, gate_std=0.0) for name in "ab")
    assert not torch.equal(first(x), second(x))


def test_noise_is_keyed_by_seed_name_step_micro_step_rank() -> None:
    layer = LearnableMaskedLinear(16, 6, name="blocks.0.fc", scaling=5.0)
    set_draw(layer, Draw(seed=1, step=2, micro_step=3, rank=4))
    noise = uniforms(philox_key(1, "gumbel", "blocks.0.fc", 2, 3, 4), 0, 6, 24)
    assert torch.equal(layer.masked_weight()[0], layer.masked_weight(noise)[0])


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("tau", "scaling"), [(1, 100), (4.0, 10.0), (0.05, 100.0)])
def test_masked_weight_of_given_noise(hard: bool, tau: float, scaling: float) -> None:
    layer = LearnableMaskedLinear(8, 3, hard=hard, tau=tau, scaling=scaling).double()
    uniform = uniforms(philox_key(9), 0, 6, 6).double()
    masked, energy = layer.masked_weight(uniform)
    kept = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = torch.zeros_like(layer.weight)
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
                    expected[row, group * 4 + j] += p[k] * layer.weight[row, group * 4 + j]
    assert masked.shape == (3, 8)
    assert float((masked - expected).detach().abs().max()) <= 1e-12
    assert energy.shape == ()
    assert float(energy.detach()) == pytest.approx(float(expected.square().sum()), rel=1e-12)


def test_kept_energy_of_the_last_forward() -> None:
    layer = LearnableMaskedLinear(8, 6)
    assert layer.kept_energy is None
    set_draw(layer, Draw())
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
        set_draw(layer, Draw())
        output = layer(x)
        setattr(layer, attribute, 2.0)
        assert not torch.allclose(layer(x), output)


def test_logits_round_trip_by_state_dict() -> None:
    layer, other = LearnableMaskedLinear(8, 6, name="a"), LearnableMaskedLinear(8, 6, name="b")
    assert sorted(layer.state_dict()) == ["bias", "logits", "weight"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(other.eval()(x), layer.eval()(x))


def test_missing_logits_are_reported() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key.*"logits"'):
        LearnableMaskedLinear(8, 6).load_state_dict(nn.Linear(8, 6).state_dict())
