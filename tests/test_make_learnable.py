"""Making the masks of a model learnable: first logits, dense for a while, and learning them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v import (
    apply_masks_,
    current_masks,
    dense_weight,
    make_learnable,
    prune,
)
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.surgery import as_dense, set_noise_key
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import generator

BLOCK = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
BODY = [f"blocks.{i}.{name}" for i in range(2) for name in BLOCK]
IMAGES = (4, 1, 8, 8)


def magnitude_masks(model: nn.Module, names: list[str], pattern: str = "2:4") -> dict[str, Tensor]:
    weights = {name: dense_weight(model.get_submodule(name)).detach() for name in names}
    return {name: NMPattern(pattern).topn_mask(weight.abs()) for name, weight in weights.items()}


# Learnable masks


def test_make_learnable_trains_logits_only(tiny_vit: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in tiny_vit.named_parameters()}
    model = make_learnable(tiny_vit, magnitude_masks(tiny_vit, BODY), pattern="2:4")
    assert model is tiny_vit
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.weight_mask.logits" for name in BODY
    }
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8"])
@pytest.mark.parametrize("strength", [3.0, 0.7])
def test_prior_shifts_the_logits(tiny_vit: nn.Module, pattern: str, strength: float) -> None:
    how = {"pattern": pattern, "gate_std": 0.2, "seed": 4}
    masks = magnitude_masks(tiny_vit, BODY, pattern)
    without = make_learnable(copy.deepcopy(tiny_vit), masks, prior_strength=0.0, **how)
    model = make_learnable(tiny_vit, masks, prior_strength=strength, **how)
    n, m = (int(part) for part in pattern.split(":"))
    candidates = NMPattern(pattern).candidates(dtype=torch.float64)
    for name, layer in learnable_masks(model).items():
        noise = learnable_masks(without)[name].logits.detach().double()
        overlap = (candidates[:, None, :] * masks[name].reshape(1, -1, m)).sum(-1)  # ⟨P, S_k⟩
        expected = noise + strength * noise.std() * (overlap - n * n / m)
        torch.testing.assert_close(layer.logits.detach().double(), expected, rtol=0, atol=1e-6)


def test_logits_start_from_seed_and_name(tiny_vit: nn.Module) -> None:
    model = make_learnable(tiny_vit, None, pattern="2:4", gate_std=0.3, seed=9, exclude=["head"])
    assert list(learnable_masks(model)) == BODY
    for name, layer in learnable_masks(model).items():
        noise = torch.from_numpy(generator(9, "logits", name).standard_normal(layer.logits.shape, dtype="float32"))
        assert torch.equal(layer.logits.detach(), noise * 0.3)
        assert layer.draw.seed == 9
        assert layer.name == name


def test_hard_reaches_every_layer(tiny_vit: nn.Module) -> None:
    make_learnable(tiny_vit, None, pattern="1:4", hard=True)
    assert all(layer.hard and layer.pattern.n == 1 for layer in learnable_masks(tiny_vit).values())


def test_share_of_masks_off_their_prior() -> None:
    model = nn.Sequential(nn.Linear(512, 256))  # 32,768 groups
    masks = magnitude_masks(model, ["0"])
    make_learnable(model, masks, pattern="2:4", prior_strength=3.0, gate_std=0.2)
    changed = (current_masks(model)["0"] != masks["0"]).reshape(-1, 4).any(1).float().mean()
    assert 0.04 < float(changed) < 0.07


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8"])
def test_magnitude_start_is_the_magnitude_mask(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(512, 256))
    make_learnable(model, None, pattern=pattern, init="magnitude")
    assert torch.equal(current_masks(model)["0"], magnitude_masks(model, ["0"], pattern)["0"])


@pytest.mark.parametrize(
    "group",
    [[1.0, 1e-5, 2e-5, 3e-5], [1e-25, 2e-25, 4e-25, 3e-25], [1.0, 1.0, 1.0, 1.0]],
    ids=["wide", "tiny", "equal"],
)
def test_magnitude_start_survives_rounding(group: list[float]) -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([group])
    make_learnable(model, None, pattern="2:4", init="magnitude")
    assert learnable_masks(model)["0"].logits.isfinite().all()
    assert torch.equal(current_masks(model)["0"], magnitude_masks(model, ["0"])["0"])


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_magnitude_logits_are_half_the_kept_energy(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(16, 3))
    weight = model[0].weight.detach().double()
    make_learnable(model, None, pattern=pattern, init="magnitude")
    parts = NMPattern(pattern)
    groups = weight.reshape(-1, parts.m)
    kept = torch.stack([(groups * candidate).square().sum(1) for candidate in parts.candidates()])
    expected = 0.5 * kept / groups.square().sum(1)
    torch.testing.assert_close(learnable_masks(model)["0"].logits.detach().double(), expected, rtol=0, atol=1e-6)


def test_magnitude_start_of_zero_groups() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    model[0].weight.data[1, 4:] = 0  # group 3
    make_learnable(model, None, pattern="2:4", init="magnitude")
    logits = learnable_masks(model)["0"].logits.detach()
    assert torch.equal(logits[:, 3], logits[:1, 3].expand(6))
    assert current_masks(model)["0"][1, 4:].tolist() == [True, True, False, False]


def test_magnitude_start_draws_nothing(tiny_vit: nn.Module) -> None:
    first = make_learnable(copy.deepcopy(tiny_vit), None, pattern="2:4", init="magnitude", seed=1)
    second = make_learnable(tiny_vit, None, pattern="2:4", init="magnitude", seed=2)
    for name, layer in learnable_masks(first).items():
        assert torch.equal(layer.logits, learnable_masks(second)[name].logits)


def test_unknown_init(tiny_vit: nn.Module) -> None:
    with pytest.raises(ConfigError, match="init is 'zeros'; allowed: 'prior', 'magnitude'"):
        make_learnable(tiny_vit, None, pattern="2:4", init="zeros")


def test_fixed_masks_become_learnable(tiny_vit: nn.Module) -> None:
    weights = {name: tiny_vit.get_submodule(name).weight.detach().clone() for name in BODY}
    masks = magnitude_masks(tiny_vit, BODY)
    apply_masks_(tiny_vit, masks, "2:4")
    make_learnable(tiny_vit, masks, pattern="2:4", gate_std=1e-3, prior_strength=50.0)
    for name, mask in learnable_masks(tiny_vit).items():
        assert torch.equal(dense_weight(tiny_vit.get_submodule(name)), weights[name])
        assert torch.equal(mask.current_mask(), masks[name])


# Dense for a while


@pytest.fixture
def learnable_vit(tiny_vit: nn.Module) -> Iterator[nn.Module]:
    return make_learnable(tiny_vit, None, pattern="2:4", exclude=["head"]).train()


@pytest.mark.parametrize("training", [True, False])
def test_as_dense(tiny_vit: nn.Module, training: bool) -> None:
    x = torch.randn(IMAGES)
    expected = tiny_vit(x)
    model = make_learnable(tiny_vit, None, pattern="2:4", exclude=["head"]).train(training)
    set_noise_key(model, NoiseKey())
    masked = model(x)
    with as_dense(model):
        assert torch.equal(model(x), expected)
    assert not torch.allclose(masked, expected)
    assert torch.equal(model(x), masked)


def test_as_dense_ends_with_an_exception(learnable_vit: nn.Module) -> None:
    x = torch.randn(IMAGES)
    masked = learnable_vit.eval()(x)
    with pytest.raises(KeyError), as_dense(learnable_vit):
        raise KeyError
    assert torch.equal(learnable_vit(x), masked)


def test_as_dense_may_be_nested(learnable_vit: nn.Module) -> None:
    x = torch.randn(IMAGES)
    with as_dense(learnable_vit.eval()):
        dense = learnable_vit(x)
        with as_dense(learnable_vit):
            pass
        assert torch.equal(learnable_vit(x), dense)


def test_dense_forward_takes_no_draw(learnable_vit: nn.Module) -> None:
    with as_dense(learnable_vit):
        learnable_vit(torch.randn(IMAGES))
    assert all(layer.draw == NoiseKey() for layer in learnable_masks(learnable_vit).values())


# Learning


def test_set_noise_key_reaches_every_layer(learnable_vit: nn.Module) -> None:
    set_noise_key(learnable_vit, NoiseKey(step=7))
    x = torch.randn(IMAGES)
    assert torch.equal(learnable_vit(x), learnable_vit(x))
    assert all(layer.draw == NoiseKey(step=7) for layer in learnable_masks(learnable_vit).values())


def test_layers_of_one_shape_get_different_noise(learnable_vit: nn.Module) -> None:
    first, second = (learnable_vit.blocks[i].mlp.fc1 for i in range(2))
    dense_weight(second).data.copy_(dense_weight(first))
    second.logits.data.copy_(first.logits)
    assert not torch.equal(first.masked_weight()[0], second.masked_weight()[0])


@pytest.mark.parametrize("hard", [False, True])
def test_optimising_logits_reduces_the_loss(tiny_vit: nn.Module, hard: bool) -> None:
    x = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        target = tiny_vit(x)
    model = make_learnable(tiny_vit, None, pattern="2:4", exclude=["head"], hard=hard)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}

    def loss_at_inference() -> float:
        with torch.no_grad():
            return float(F.mse_loss(model.eval()(x), target))

    before = loss_at_inference()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for step in range(20):
        set_noise_key(model, NoiseKey(step=step))
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    assert loss_at_inference() < 0.8 * before
    after = dict(model.named_parameters())
    for name, parameter in frozen.items():
        assert torch.equal(after[name], parameter)


# Precision


@pytest.mark.parametrize("gate", ["candidates", "positions"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("init", ["prior", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_small_steps_move_logits_whatever_the_weights_are(dtype: torch.dtype, init: str, hard: bool, gate: str) -> None:
    """At −1.5 bfloat16 goes in steps of 0.008, float16 in steps of 0.001."""
    layers = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8)).to(dtype)
    prior = prune(copy.deepcopy(layers), "magnitude")
    model = make_learnable(layers, prior, pattern="2:4", init=init, gate_std=1.0, hard=hard, gate=gate).train()
    logits = [mask.logits for mask in learnable_masks(model).values()]
    assert {one.dtype for one in logits} == {torch.promote_types(dtype, torch.float32)}
    before = [one.detach().clone() for one in logits]
    with torch.no_grad():
        for one in logits:
            one.add_(1e-3)
    for one, old in zip(logits, before, strict=True):
        torch.testing.assert_close(one - old, torch.full_like(old, 1e-3), rtol=1e-3, atol=0)
    model(torch.randn(5, 32, dtype=dtype)).float().square().sum().backward()
    assert all(one.grad.isfinite().all() and one.grad.any() for one in logits)
    masks = current_masks(model)
    assert init == "prior" or all(masks[name].equal(mask) for name, mask in prior.items())
