"""Layers under a fixed mask, and what both kinds of masked layers have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v import LearnableMaskedLinear, MaskedLinear, dense_weight
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError, PatternError

either_class = pytest.mark.parametrize("layer_class", [MaskedLinear, LearnableMaskedLinear])


def random_mask(layer: nn.Linear, n: int = 2, m: int = 4) -> Tensor:
    return NMPattern(n, m).topn_mask(torch.randn_like(dense_weight(layer)))


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
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.weight_mask\.mask"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["1.weight_mask.mask"]


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
    weight = torch.where(layer.current_mask(), dense_weight(layer), torch.zeros(()))
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))


def test_masked_weights_get_no_gradient(masked: MaskedLinear) -> None:
    masked(torch.randn(3, 8)).square().sum().backward()
    grad = dense_weight(masked).grad
    assert not grad[~masked.current_mask()].any()
    assert grad[masked.current_mask()].all()


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
    assert dense_weight(layer) is linear.weight
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
    before = dense_weight(layer).detach().clone()
    layer.fold().weight.data.zero_()
    assert torch.equal(dense_weight(layer), before)


@pytest.mark.parametrize("trainable", [True, False])
def test_fold_keeps_requires_grad(masked: MaskedLinear, trainable: bool) -> None:
    dense_weight(masked).requires_grad_(trainable)
    assert masked.fold().weight.requires_grad is trainable


@either_class
def test_deepcopy_computes_the_same(layer_class: type[nn.Linear]) -> None:
    layer = make(layer_class).eval()
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@either_class
def test_repr_shows_the_pattern(layer_class: type[nn.Linear]) -> None:
    assert "pattern=2:4" in repr(layer_class(8, 6))
