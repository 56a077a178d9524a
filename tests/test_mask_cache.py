"""Masked weights that evaluation keeps: each change that no tensor's version tells has to be noticed all the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskllm4v import dense_weight, make_learnable, prune
from maskllm4v.sparsity.joined import join_draws
from maskllm4v.sparsity.parameters import masked_parameters

KINDS: dict[str, Callable[[nn.Module], object]] = {
    "fixed": lambda model: prune(model, "magnitude"),
    "learnable": lambda model: make_learnable(model, None, pattern="2:4"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))


def made(kind: str) -> nn.Sequential:
    """In evaluation, with frozen weights: what is computed is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    KINDS[kind](model)
    return model.requires_grad_(False).eval()


def is_as_new(model: nn.Module, x: Tensor = X) -> bool:
    """Whether it computes what a copy does, which has nothing in store."""
    return torch.equal(model(x), copy.deepcopy(model)(x))


@every_kind
def test_it_is_kept(kind: str) -> None:
    model = made(kind)
    model(X)
    first = model[0].weight
    model(X)
    assert model[0].weight is first


@every_kind
def test_functional_calls_one_after_the_other(kind: str) -> None:
    """Their tensors are gone after a call, so that the next ones have the same places and ids."""
    model = made(kind)
    weights = {name: p.detach() for name, p in model.named_parameters() if "logits" not in name}

    def outputs(new: bool) -> list[Tensor]:
        return [
            torch.func.functional_call(
                copy.deepcopy(model) if new else model, {n: w * factor for n, w in weights.items()}, (X,)
            )
            for factor in range(1, 30)
        ]

    assert all(torch.equal(a, b) for a, b in zip(outputs(False), outputs(True), strict=True))


@every_kind
def test_parameters_that_are_replaced(kind: str) -> None:
    model = made(kind)
    for _ in range(3):
        model[0].weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
        assert is_as_new(model)
        state = {name: torch.randn_like(t) if "mask.mask" not in name else t for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        assert is_as_new(model)


@every_kind
def test_there_and_back_again(kind: str) -> None:
    """Rounded weights are often where the others were."""
    model = made(kind)
    for _ in range(6):
        dense_weight(model[0]).normal_()
        before = model(X)
        model.to(torch.bfloat16).to(torch.float32)
        assert is_as_new(model)
        assert not torch.equal(model(X), before)


@every_kind
def test_one_mode_after_another(kind: str) -> None:
    model, x = made(kind), X.clone().requires_grad_()
    plain = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(X)
    assert low.dtype is torch.bfloat16
    assert torch.equal(model(X), plain)
    with torch.inference_mode():
        assert torch.equal(model(X), plain)
    (wanted,) = torch.autograd.grad(copy.deepcopy(model)(x).sum(), x)
    with torch.no_grad():
        model(X)
    (found,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(found, wanted)
    with torch.inference_mode():
        model(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), low)


@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("filled", [True, False])
def test_recomputation(kind: str, reentrant: bool, filled: bool) -> None:
    """The second time the weight is there already, the first time it may not be."""
    model, x = made(kind), X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(copy.deepcopy(model)(x).sum(), x)
    if filled:
        model(X)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, wanted)


@every_kind
def test_copies_hold_nothing(kind: str) -> None:
    model = made(kind)
    empty = pickle.dumps(model)
    outputs = model(X)
    assert pickle.dumps(model) == empty
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), outputs)
    other = copy.deepcopy(model)
    assert not other[0].weight_mask.is_of(model[0].weight)
    dense_weight(other[0]).mul_(2)
    assert is_as_new(other)
    assert torch.equal(model(X), outputs)


@every_kind
@torch.no_grad()
def test_masks_made_in_inference_mode(kind: str) -> None:
    """Their tensors count no changes, so that nothing may be kept."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    with torch.inference_mode():
        KINDS[kind](model)
    model.requires_grad_(False).eval()
    outputs = [model(X), model(X)]
    dense_weight(model[0]).data.mul_(2)
    assert torch.equal(*outputs)
    assert not torch.equal(model(X), outputs[0])


def test_looking_at_a_weight_computes_a_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made("learnable"), []
    gate = model[0].gate
    real = gate.mask
    monkeypatch.setattr(gate, "mask", lambda *args: calls.append(1) or real(*args))
    for _ in range(3):
        assert hasattr(model[0], "weight")
        assert model[0].weight.shape == (16, 16)
        model(X)
    assert len(calls) == 1


# What FSDP has cut up


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_cut_up_parameters_are_given_as_they_are() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = made("learnable").train()
    for mask in (model[0].weight_mask, model[2].weight_mask):
        mask.logits.requires_grad_()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(model[0].weight, DTensor)
    assert model[0].weight is dense_weight(model[0])
    assert hasattr(model[0], "weight")
    assert not join_draws(masked_parameters(model).values())
    model(X).square().sum().backward()
    assert model[0].weight_mask.logits.grad.full_tensor().any()
