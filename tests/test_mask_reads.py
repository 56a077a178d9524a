"""What a reader of a masked weight gets, and when: nothing stale, nothing lost, no more draws than needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskllm4v import LearnableMaskedLinear, MaskedLinear, dense_weight, make_learnable, prune
from maskllm4v.sparsity import learnable as learnable_module
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameters import learnable_masks, masked_parameters
from maskllm4v.sparsity.surgery import as_dense, set_noise_key
from maskllm4v.utils.errors import ConfigError


class Reader(nn.Module):
    """Reads the weight of one layer itself, and twice; calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.checkpoints = nn.Linear(16, 16), nn.Linear(16, 8), ""

    def body(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.read.weight)), self.read.weight, self.read.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoints:
            return self.called(checkpoint(self.body, x, use_reentrant=self.checkpoints == "reentrant"))
        return self.called(self.body(x))


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of the mask operation."""
    found: list[int] = []
    real = learnable_module.masked_weight
    monkeypatch.setattr(learnable_module, "masked_weight", lambda *a, **how: found.append(1) or real(*a, **how))
    return found


def learnable(fixed_noise: bool = True) -> Reader:
    torch.manual_seed(0)
    model = make_learnable(Reader(), None, pattern="2:4").train()
    if fixed_noise:
        set_noise_key(model, NoiseKey(step=3))
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [mask.logits.grad.clone() for mask in learnable_masks(model).values()]


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))


# One draw for all readers of a forward


def test_readers_of_one_forward_share_a_draw(draws: list[int]) -> None:
    model = learnable()
    gradients(model, X)
    assert len(draws) == 2
    gradients(model, X)
    assert len(draws) == 4


def test_looking_at_a_weight_costs_no_further_draw(draws: list[int]) -> None:
    model = learnable()

    def look(module: nn.Module, *_: Any) -> None:
        assert hasattr(model.read, "weight")
        assert model.read.weight.shape == (16, 16)
        assert model.read.weight.dtype is torch.float32
        assert model.read.weight.device.type == "cpu"
        repr(model)
        model.state_dict()
        list(model.named_parameters())

    model.called.register_forward_pre_hook(look)
    model(X)
    assert len(draws) == 2


def test_changing_what_surrounds_a_weight_costs_no_draw(draws: list[int]) -> None:
    model = learnable()
    model.to(torch.float64).to(torch.float32)
    copy.deepcopy(model)
    model.read.weight = nn.Parameter(torch.ones(16, 16), requires_grad=False)
    model.load_state_dict(model.state_dict())
    assert not draws
    assert dense_weight(model.read).eq(1).all()


def test_reading_does_not_move_the_noise_and_the_models_forward_does() -> None:
    model = learnable(fixed_noise=False)
    mask = model.read.weight_mask
    for _ in range(3):
        model.read.weight  # noqa: B018
        model.called(torch.randn(2, 16))  # a part of the model, not the model
    assert mask.draw == NoiseKey(step=0)
    first = model(X)
    assert mask.draw == model.called.weight_mask.draw == NoiseKey(step=1)
    assert not torch.equal(model(X), first)
    model.eval()(X)
    with as_dense(model.train()):
        model(X)
    assert mask.draw == NoiseKey(step=2)


def test_a_wrapped_model_moves_on_by_itself() -> None:
    model = nn.Sequential(learnable(fixed_noise=False), nn.Identity())
    model(X)
    assert model[0].read.weight_mask.draw == NoiseKey(step=1)


def test_a_part_learned_before_the_whole_moves_on_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    outer = nn.ModuleDict({"inner": model})
    make_learnable(model, None, pattern="2:4")
    whole = nn.Sequential(outer["inner"], nn.Linear(8, 4))
    make_learnable(whole, None, pattern="2:4").train()
    whole(X)
    assert {mask.draw.step for mask in learnable_masks(whole).values()} == {1}


# Nothing stale


def changes() -> dict[str, Callable[[Reader], object]]:
    def fused(model: Reader) -> None:
        logits = model.read.weight_mask.logits
        logits.grad = logits.detach().clone()
        torch.optim.AdamW([logits], lr=0.5, fused=True).step()

    def data(model: Reader) -> None:
        model.read.weight_mask.logits.data.mul_(-1)

    def weight(model: Reader) -> None:
        dense_weight(model.read).data.mul_(2)

    def vector(model: Reader) -> None:
        logits = model.read.weight_mask.logits
        nn.utils.vector_to_parameters(-nn.utils.parameters_to_vector([logits]).detach(), [logits])

    def hard(model: Reader) -> None:
        model.read.hard = not model.read.hard

    return {
        "fused": fused,
        "data": data,
        "weight": weight,
        "vector": vector,
        "hard": hard,
        "step": lambda model: set_noise_key(model, NoiseKey(step=4)),
        "tau": lambda model: setattr(model.read, "tau", 9.0),
        "scaling": lambda model: setattr(model.read, "scaling", 1.0),
        "state": lambda m: m.load_state_dict({k: -v if "logits" in k else v for k, v in m.state_dict().items()}),
    }


@pytest.mark.parametrize("what", changes())
@pytest.mark.parametrize("grad", [True, False])
def test_training_forward_after_a_change_is_anew(what: str, grad: bool) -> None:
    model = learnable()
    with torch.set_grad_enabled(grad):
        before = model(X).detach()
        changes()[what](model)
        assert not torch.equal(model(X), before)
        fresh = copy.deepcopy(model)
        assert torch.equal(model(X), fresh(X))


@pytest.mark.parametrize("what", ["fused", "data", "weight", "vector", "state"])
def test_modes_are_borders(what: str) -> None:
    """Weights of evaluation are kept until the mode is set."""
    model = learnable().eval()
    with torch.no_grad():
        before = model(X)
        assert torch.equal(model(X), before)
        model.train()
        with torch.enable_grad():
            changes()[what](model)
        model.eval()
        assert not torch.equal(model(X), before)
        assert torch.equal(model(X), copy.deepcopy(model)(X))


def test_evaluation_computes_a_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = learnable().eval(), []
    gate = model.read.gate
    real = gate.mask
    monkeypatch.setattr(gate, "mask", lambda *args: calls.append(1) or real(*args))
    for _ in range(3):
        model(X)
    assert len(calls) == 1


def test_trained_weights_in_evaluation_mode_are_never_kept() -> None:
    model = Reader().eval()
    prune(model, "magnitude")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(model(X), copy.deepcopy(model)(X))


def test_a_draw_without_a_graph_serves_no_training() -> None:
    model = learnable()
    with torch.no_grad():
        outputs = model(X)
    found = model(X)
    assert found.requires_grad
    assert torch.equal(found, outputs)
    with torch.inference_mode():
        assert torch.equal(model(X), outputs)
        model.eval()(X)
    model(X.clone().requires_grad_()).sum().backward()
    gradients(model.train(), X)


def test_a_draw_of_one_precision_serves_no_other() -> None:
    model = learnable()
    outputs = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.read.weight.dtype is torch.bfloat16
        low = model(X)
    assert low.dtype is torch.bfloat16
    assert model.read.weight.dtype is torch.float32
    assert torch.equal(model(X), outputs)


def test_two_forwards_then_two_backwards() -> None:
    model = learnable()
    a, b = model(X), model(2 * X)
    a.sum().backward()
    b.sum().backward()
    separate = learnable()
    separate(X).sum().backward()
    separate(2 * X).sum().backward()
    for mask, other in zip(learnable_masks(model).values(), learnable_masks(separate).values(), strict=True):
        assert torch.equal(mask.logits.grad, other.logits.grad)


@contextmanager
def outside(model: Reader) -> Iterator[None]:
    """The weight is looked at outside of the region that is computed again, and inside of the model's forward."""

    def look(module: nn.Module, _: Any) -> None:
        module.read.weight  # noqa: B018

    handle = model.register_forward_pre_hook(look)
    yield
    handle.remove()


@pytest.mark.parametrize("looks", [nullcontext, outside])
@pytest.mark.parametrize("kind", ["reentrant", "not"])
def test_recomputation_draws_the_same_again(kind: str, looks: Any) -> None:
    model, x = learnable(), X.clone().requires_grad_()
    alone = gradients(model, x)
    model.checkpoints = kind
    with looks() if looks is nullcontext else looks(model):
        found = gradients(model, x)
    for a, b in zip(found, alone, strict=True):  # two readers of a weight have a draw each then
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("kind", ["reentrant", "not"])
def test_recomputation_needs_noise_that_somebody_sets(kind: str) -> None:
    model = learnable(fixed_noise=False)
    model.checkpoints = kind
    with pytest.raises(RuntimeError, match="needs set_noise_key"):
        gradients(model, X.clone().requires_grad_())


# Nothing lost


WRITES: dict[str, Callable[[Tensor], object]] = {
    "init": nn.init.zeros_,
    "in place": lambda weight: weight.mul_(2),
    "item": lambda weight: weight.__setitem__(0, 1.0),
    "foreach": lambda weight: torch._foreach_mul_([weight], 2.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_writing_to_what_was_read_is_an_error(write: str, training: bool, fixed: bool) -> None:
    if fixed:
        prune(model := Reader(), "magnitude")
    else:
        model = learnable()
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        WRITES[write](model.read.weight)
    with pytest.raises(RuntimeError, match=r"'read' was written to.*write to maskllm4v\.dense_weight"):
        model(X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(X)
    with torch.no_grad():
        WRITES[write](dense_weight(model.read))
    assert not torch.equal(dense_weight(model.read), before["read.weight"])
    model(X)


def test_a_missing_mask_is_an_error_for_readers_too() -> None:
    with pytest.raises(Exception, match="no mask yet"):
        F.linear(torch.ones(1, 8), MaskedLinear(8, 6).weight)


def test_a_fault_of_a_mask_does_not_make_it_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.Module answers an AttributeError of a property with the parameter of that name."""
    layer = LearnableMaskedLinear(8, 6)

    def fail(*_: object) -> Tensor:
        raise AttributeError("gone")

    monkeypatch.setattr(layer.weight_mask, "masked", fail)
    with pytest.raises(RuntimeError, match="gone"):
        layer(torch.ones(1, 8))


def test_a_deleted_mask_does_not_make_it_dense() -> None:
    layer = LearnableMaskedLinear(8, 6)
    del layer.weight_mask
    with pytest.raises(KeyError):
        layer(torch.ones(1, 8))


def test_dense_weight_is_the_parameter() -> None:
    layer = nn.Linear(8, 6)
    assert dense_weight(layer) is layer.weight
    assert dense_weight(MaskedLinear.from_linear(layer)) is layer.weight
    with pytest.raises(ConfigError, match="MultiheadAttention without a parameter 'weight'"):
        dense_weight(nn.MultiheadAttention(8, 2))


# What records or stands for operations


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_traces_hold_no_cache() -> None:
    model = learnable().eval()
    outputs = model(X)
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), outputs)
    torch.testing.assert_close(torch.jit.trace(model, X)(X), outputs)
    assert torch.equal(model(X), outputs)


def test_functional_calls_see_the_parameters_given() -> None:
    model = learnable().eval()
    outputs = model(X)
    given = {name: 2 * tensor if name == "read.weight" else tensor for name, tensor in model.named_parameters()}
    found = torch.func.functional_call(model, given, (X,))
    assert not torch.equal(found, outputs)
    assert torch.equal(model(X), outputs)
    batched = torch.func.vmap(lambda x: torch.func.functional_call(model, given, (x,)))(X)
    torch.testing.assert_close(batched, found)


def test_names_and_kinds_of_parameters() -> None:
    model, dense = learnable(), Reader()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if "_mask" not in name] == [name for name, _ in dense.named_parameters()]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.weight_mask.logits" for name in masked_parameters(model)
    }
    assert isinstance(model.read, nn.Linear)
    assert next(model.children()) is model.read
