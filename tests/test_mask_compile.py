"""Models with learnable layers under ``torch.compile``: the same numbers, and nothing compiled twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mask_oracle import Case
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from maskllm4v.sparsity import gumbel
from maskllm4v.sparsity.layers import LearnableMaskedLinear, dense_weight
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameters import learnable_masks, masked_parameters
from maskllm4v.sparsity.surgery import as_dense, make_learnable, set_noise_key

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks


@pytest.fixture(autouse=True)
def compiled_afresh() -> Iterator[None]:
    """What was compiled before does not count, and too many compilations are an error, not uncompiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def small_model(n: int = 2, **how: Any) -> nn.Sequential:
    layers = [LearnableMaskedLinear(*size, N=n, name=name, **how) for name, size in (("a", (16, 12)), ("b", (12, 8)))]
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


Module = Callable[[Tensor], Tensor]


def step(model: nn.Sequential, forward: Module, x: Tensor, amp: bool = False) -> list[Tensor]:
    """Outputs, energy, and the gradients of a loss of both by all that is trained."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = forward(x)
    energy = torch.stack([layer.kept_energy for layer in learnable_masks(model).values()]).sum()
    (output.float().square().sum() - 0.37 * energy).backward()
    return [output.detach(), energy.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def agree(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is b.dtype
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


class Counting:
    """A backend that traces forward and backward, and counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced = lookup_backend("aot_eager")(graph, inputs)  # at first it may ask dynamo for another graph
        self.graphs += 1
        return traced


# The same numbers


def test_compiled_model_computes_the_same() -> None:
    model, x = small_model(tau=2.0, scaling=10.0), torch.randn(4, 5, 16)
    set_noise_key(model, NoiseKey(step=3))
    expected = step(model, model, x)
    agree(step(model, torch.compile(model, fullgraph=True), x), expected)


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ({}, {"backend": "chunked"}),
        ({"hard": True}, {}),
        ({"n": 1}, {}),
        ({"tau": 0.5}, {"amp": True}),
        ({"hard": True}, {"amp": True}),
        ({"hard": True}, {"trainable": True}),
        ({"gate": "positions"}, {}),
    ],
)
def test_traced_model_computes_the_same(how: dict[str, Any], changes: dict[str, Any]) -> None:
    model, x = small_model(scaling=10.0, **how), torch.randn(4, 5, 16)
    set_noise_key(model, NoiseKey(step=3))
    for one in masked_parameters(model).values():
        one.learnable.backend = changes.get("backend", "auto")
        one.weight.requires_grad_("trainable" in changes)
    expected = step(model, model, x, "amp" in changes)
    found = step(model, torch.compile(model, fullgraph=True, backend=Counting()), x, "amp" in changes)
    agree(found, expected, rtol=1e-2 if "amp" in changes else 1e-5)  # outputs of 8 bits may round to a neighbour


def test_graphs_for_cpus_hold_the_compiled_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def choose(name: str, *args: Any) -> Any:
        asked.append(name)
        return chosen(name, *args)

    chosen = gumbel.choose
    monkeypatch.setattr(gumbel, "choose", choose)
    model, x = small_model(hard=True), torch.randn(3, 16)
    step(model, torch.compile(model, backend=Counting()), x)
    assert asked == ["compiled"] * 4  # forward and backward of two layers
    model[0].backend = model[2].backend = "chunked"
    step(model, torch.compile(model, backend=Counting()), x)
    assert asked[4:] == ["chunked"] * 4


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [None, 2], ids=["candidates", "positions"])
def test_operator_keeps_its_promises(kept: int | None, dtype: torch.dtype, weight_grad: bool) -> None:
    """About types and shapes of what it returns, aliases, and gradients."""
    case = Case(dtype=torch.float32)
    if kept is not None:
        case.logits, case.candidates = case.logits[:4].clone(), None
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.7, 10.0)]
    inputs = [case.weight.requires_grad_(weight_grad), case.logits.requires_grad_(), case.candidates, *numbers]
    key = torch.from_numpy(case.key.view("int64"))
    torch.library.opcheck(gumbel._masked_weight, (*inputs, True, None, key, None, kept, dtype, "chunked"))
    keys, groups = torch.stack([key, key]), case.logits.shape[1]
    torch.library.opcheck(gumbel._masked_weight, (*inputs, True, None, keys, [groups - 7, 7], kept, dtype, "chunked"))


# Nothing compiled twice


def graphs_so_far() -> int:
    """All that dynamo has traced, the mask operation's own functions included."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("auto_advance", [False, True], ids=["set_noise_key", "by itself"])
def test_annealing_compiles_nothing_again(auto_advance: bool) -> None:
    model, x, counting = small_model(), torch.randn(4, 16), Counting()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=not auto_advance, backend=counting)
    counts = []
    for number, tau in enumerate([4.0, 3.0, 2.0, 1.5, 1.25, 1.0, 1.0, 0.5]):
        for one in (model, eager):
            for layer in learnable_masks(one).values():
                layer.tau, layer.scaling = tau, 10.0 + number
            if not auto_advance:
                set_noise_key(one, NoiseKey(step=number, micro_step=number % 2))
        agree(step(model, compiled, x), step(eager, eager, x), rtol=2e-5)
        counts.append((counting.graphs, graphs_so_far()))
    assert counts[1] == counts[4]
    assert counts[5][0] == counts[4][0]  # τ = 1 is the operation's affair
    assert counts[5][1] <= counts[4][1] + 2
    assert counts[7] == counts[5]
    assert counts[0][0] == 1 or auto_advance


class Reader(nn.Module):
    """Reads the weight of one layer itself, and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(F.linear(x, self.read.weight)), self.read.weight, self.read.bias)
        return self.attention(x, x, x, need_weights=False)[0]


def test_weights_that_are_read_compile_whole_and_once() -> None:
    torch.manual_seed(0)
    model, x, counting = make_learnable(Reader(), None, pattern="2:4").train(), torch.randn(3, 5, 16), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for number, tau in enumerate([4.0, 3.0, 2.0, 1.5]):
        for mask in learnable_masks(model).values():
            mask.tau, mask.scaling = tau, 10.0 + number
        set_noise_key(model, NoiseKey(step=number))
        agree(step(model, compiled, x), step(model, model, x), rtol=1e-4)
    assert counting.graphs == 1


def test_teacher_is_the_dense_model() -> None:
    model, x, counting = small_model(hard=True), torch.randn(4, 16), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    a, b = model[0], model[2]
    dense = F.linear(model[1](F.linear(x, dense_weight(a), a.bias)), dense_weight(b), b.bias)
    counts = []
    for number in range(4):
        set_noise_key(model, NoiseKey(step=number))
        model.train()
        expected = step(model, model, x)
        agree(step(model, compiled, x), expected)
        model.eval()
        with torch.no_grad(), as_dense(model):
            torch.testing.assert_close(compiled(x), dense)
        torch.testing.assert_close(compiled(x), model(x))  # arg-max masks
        assert not torch.allclose(model(x), dense)
        counts.append(counting.graphs)
    assert counts[0] == counts[3] == 3
