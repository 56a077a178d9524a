"""What the mask operation keeps for backward, and what may change before backward comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from mask_oracle import Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.layers import LearnableMaskedLinear, dense_weight
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.surgery import set_noise_key

TINY = 64  # bytes: τ, s and the key of a draw are 32
every_backend = pytest.mark.parametrize(
    ("backend", "n", "m", "hard"),
    [("chunked", 2, 4, False), ("chunked", 2, 4, True), ("chunked", 1, 4, False), ("compiled", 2, 4, False)],
)


@contextmanager
def saving() -> Iterator[list[Tensor]]:
    """Every tensor that autograd saves."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def new_bytes(saved: list[Tensor], known: list[Tensor]) -> int:
    """What the saved tensors occupy next to those that are there anyway."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for place, size in storages.items() if place not in {t.untyped_storage().data_ptr() for t in known})


# Memory


@every_backend
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_operation_keeps_its_inputs_only(backend: str, n: int, m: int, hard: bool, dtype: torch.dtype | None) -> None:
    case = Case(n, m, out=64, dtype=torch.float32)
    inputs = [case.weight, case.logits.requires_grad_(), case.candidates]
    with saving() as saved:
        masked, energy = masked_weight(
            *inputs, tau=0.7, scaling=10.0, hard=hard, key=case.key, dtype=dtype, backend=backend
        )
    assert any(t.data_ptr() == case.logits.data_ptr() for t in saved)
    assert new_bytes(saved, inputs) <= TINY
    # what it returns hangs on nothing else either
    assert masked.grad_fn is energy.grad_fn
    assert not any(isinstance(value, Tensor) for value in vars(masked.grad_fn).values())


@pytest.mark.parametrize(("amp", "limit"), [(False, 4), (True, 0)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_layer_keeps_its_masked_weight(amp: bool, limit: int, hard: bool) -> None:
    """In the type that it is multiplied in: a dense layer keeps as much under autocast, and nothing without."""
    dense, x = nn.Linear(64, 48), torch.randn(5, 64, requires_grad=True)
    learnable, kept = LearnableMaskedLinear(64, 48, hard=hard), []
    for layer in (dense, learnable):
        with saving() as saved, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            layer(x)
        kept.append(new_bytes(saved, [x, *layer.parameters(), *layer.buffers()]))
    assert kept[1] - kept[0] <= limit * 64 * 48 + TINY
    assert kept[1] >= (2 if amp else 4) * 64 * 48  # it was looked at


# What moves on before backward


def gradient(layer: LearnableMaskedLinear, *losses: Tensor) -> Tensor:
    layer.logits.grad = None
    torch.stack(losses).sum().backward()
    assert layer.logits.grad is not None
    return layer.logits.grad.clone()


def loss_of(layer: LearnableMaskedLinear, x: Tensor) -> Tensor:
    output = layer(x)
    assert layer.kept_energy is not None
    return output.square().sum() - 0.37 * layer.kept_energy


def move_on(what: str, layer: LearnableMaskedLinear) -> None:
    if what == "draw":
        set_noise_key(layer, NoiseKey(seed=1, step=8))
    elif what in ("tau", "scaling"):
        setattr(layer, what, 3.0)


@pytest.mark.parametrize("what", ["draw", "tau", "scaling", "by itself"])
@pytest.mark.parametrize(("backend", "hard"), [("chunked", False), ("chunked", True), ("compiled", False)])
def test_each_forward_has_its_own_draw(what: str, backend: str, hard: bool) -> None:
    layer, x = LearnableMaskedLinear(16, 6, hard=hard, scaling=5.0), torch.randn(2, 3, 16)
    layer.backend = backend

    def restart() -> None:
        layer.tau, layer.scaling, layer.draw, layer.auto_advance = 2.0, 5.0, NoiseKey(), what == "by itself"

    restart()
    first = loss_of(layer, x[0])
    move_on(what, layer)
    both = gradient(layer, first, loss_of(layer, x[1]))
    restart()
    alone = [gradient(layer, loss_of(layer, x[0]))]
    move_on(what, layer)
    alone.append(gradient(layer, loss_of(layer, x[1])))
    assert torch.equal(both, alone[0] + alone[1])
    restart()
    alone[1] = gradient(layer, loss_of(layer, x[1]))
    assert not torch.equal(both, alone[0] + alone[1])  # it would be seen


@pytest.mark.parametrize("name", ["logits", "weight"])
def test_inputs_must_not_change_before_backward(name: str) -> None:
    layer = LearnableMaskedLinear(16, 6)
    loss = loss_of(layer, torch.randn(3, 16))
    with torch.no_grad():
        {"logits": layer.logits, "weight": dense_weight(layer)}[name].mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Activation checkpointing


def mlp() -> nn.Sequential:
    return nn.Sequential(LearnableMaskedLinear(16, 8, name="a"), nn.GELU(), LearnableMaskedLinear(8, 4, name="b"))


def gradients(model: nn.Sequential, run: Callable[[Tensor], Tensor], x: Tensor, amp: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = run(x).float().square().sum()
        loss = loss - 0.1 * torch.stack([layer.kept_energy for layer in (model[0], model[2])]).sum()
    loss.backward()
    return [x.grad.clone(), *(parameter.grad.clone() for parameter in (model[0].logits, model[2].logits))]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_recomputed_layers_give_the_same_gradients(amp: bool) -> None:
    model, x, found = mlp(), torch.randn(5, 16), []
    set_noise_key(model, NoiseKey(step=3))
    calls: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        found.append(gradients(model, run, x.clone().requires_grad_(), amp))
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_a_layer_that_has_moved_on_is_refused(reentrant: bool) -> None:
    """Its second forward would draw other noise than its first, and gradients would be wrong."""
    layer = LearnableMaskedLinear(16, 8)
    output = checkpoint(layer, torch.randn(5, 16, requires_grad=True), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="set_noise_key"):
        output.sum().backward()
