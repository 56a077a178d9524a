"""Sums over calibration inputs: float32 whatever the process computes in, and never without a value, unsaid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from streaming import both_ways, check_stream, images
from torch import Tensor, nn

from maskllm4v import permute_channels_, prune, update_weights_
from maskllm4v.oneshot.activations.paired import layer_statistics
from maskllm4v.oneshot.activations.statistics import CrossCovariance, Hessian, InputNorm
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.sparsity.survey import prunable_matrices
from maskllm4v.utils.errors import ConfigError, DataError

METHODS: dict[str, Callable[[nn.Module, Any], object]] = {
    "wanda": lambda model, shown: prune(model, "wanda", calibration=shown),
    "ria": lambda model, shown: prune(model, "ria", calibration=shown),
    "sparsegpt": lambda model, shown: prune(model, "sparsegpt", calibration=shown),
    "sparsegpt, updating": lambda model, shown: prune(model, "sparsegpt", calibration=shown, update_weights=True),
    "least squares": lambda model, shown: updated(model, "least_squares", shown),
    "sparsegpt's update": lambda model, shown: updated(model, "sparsegpt", shown),
    "permutation": lambda model, shown: permute_channels_(model, "2:4", calibration=shown),
}
every_method = pytest.mark.parametrize("method", METHODS)


def updated(model: nn.Module, method: str, shown: Any) -> None:
    prune(model, "magnitude")
    update_weights_(model, method, calibration=shown)


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


# Precision


@pytest.mark.parametrize("default_dtype", [torch.float16, torch.bfloat16, torch.float64], indirect=True)
@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("statistic", [InputNorm, Hessian, CrossCovariance])
def test_sums_are_float32_whatever_the_default(statistic: type) -> None:
    found = statistic(8, torch.device("cpu"))
    rows = torch.full((2, 8), 1000.0, dtype=torch.float32)
    found.update(rows, rows) if statistic is CrossCovariance else found.update(rows)
    sums = found.sum_of_squares if statistic is InputNorm else found.mean
    assert sums.dtype is torch.float32
    assert sums.eq(2e6).all()  # 65,504 is the most that float16 can hold


@every_method
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float16], indirect=True)
def test_methods_do_the_same_whatever_the_default(tiny_vit: nn.Module, method: str, default_dtype: torch.dtype) -> None:
    shown = [300 * batch for batch in (torch.randn(n, 1, 8, 8, dtype=torch.float32) for n in (30, 40))]
    other = copy.deepcopy(tiny_vit)
    METHODS[method](tiny_vit, shown)
    torch.set_default_dtype(torch.float32)
    METHODS[method](other, shown)
    found, expected = tiny_vit.state_dict(), other.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in found.values()} <= {torch.float32, torch.bool}


# Not finite


@every_method
@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1e30], ids=["inf", "nan", "too large"])
def test_the_layer_whose_sums_are_not_finite_is_named(tiny_vit: nn.Module, method: str, factor: float) -> None:
    """The first one that is fed so, though what comes behind it sees such inputs, too."""
    tiny_vit.blocks[0].norm2.register_forward_hook(lambda *args: args[2] * factor)
    layer = "fc2" if method == "permutation" else "fc1"  # whose inputs are hidden channels
    with pytest.raises(DataError, match=rf"^layer 'blocks\.0\.mlp\.{layer}': calibration gave inputs that are not fin"):
        METHODS[method](tiny_vit, images())


@pytest.mark.parametrize("of", ["dense", "masked"])
def test_the_twins_inputs_have_to_be_finite(tiny_vit: nn.Module, of: str) -> None:
    dense = copy.deepcopy(tiny_vit)
    broken = dense if of == "dense" else tiny_vit
    broken.blocks[1].norm2.register_forward_hook(lambda *args: args[2] * float("nan"))
    stream = layer_statistics(tiny_vit, prunable_matrices(tiny_vit), [Calibration(images())], dense=dense)
    with pytest.raises(DataError, match=r"^layer 'blocks\.1\.mlp\.fc1': .*not finite"):
        list(stream)


# Layers that see nothing


class Mixture(nn.Module):
    """A token goes to the expert that its first number names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = x[:, 0].round() == number
            if chosen.any() or self.calls_idle:
                made[chosen] = expert(x[chosen])
        return x + self.last(made)

    calls_idle = False


class Mixtures(nn.Module):
    def __init__(self, calls_idle: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mixture(), Mixture()])
        for block in self.blocks:
            block.calls_idle = calls_idle

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.cat([x[:, :1], block(x)[:, 1:]], 1)
        return x


def tokens(*experts: int) -> Tensor:
    return torch.cat([torch.tensor(experts, dtype=torch.float32)[:, None], torch.randn(len(experts), 7)], 1)


@both_ways
@pytest.mark.parametrize("calls_idle", [False, True], ids=["not called", "called with no token"])
def test_experts_without_tokens_are_named(propagate: str, calls_idle: bool) -> None:
    model = Mixtures(calls_idle)
    idle = r"layers 'blocks\.0\.experts\.1\.0'(,| and) .*(saw no input|never reached).*`exclude`"
    with pytest.raises(DataError, match=idle):
        prune(model, "wanda", calibration=[tokens(0, 2, 0), tokens(2, 2)], propagate=propagate)


@both_ways
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_experts_that_only_later_batches_reach(propagate: str, statistic: type) -> None:
    model = Mixtures().eval()
    units = check_stream(model, [tokens(0, 0), tokens(0, 2), tokens(1, 0)], propagate, statistic)
    assert [name for unit in units for name in unit] == list(prunable_matrices(model))


@every_method
def test_empty_batches_are_named(tiny_vit: nn.Module, method: str) -> None:
    with pytest.raises(DataError, match=r"layers? 'blocks\.0\..* saw no input: batches are empty"):
        METHODS[method](tiny_vit, torch.randn(0, 1, 8, 8))


def test_a_batch_may_be_empty(tiny_vit: nn.Module) -> None:
    other, shown = copy.deepcopy(tiny_vit), images()
    found = prune(tiny_vit, "sparsegpt", calibration=[shown[0][:0], *shown])
    expected = prune(other, "sparsegpt", calibration=shown)
    assert all(found[name].equal(mask) for name, mask in expected.items())


# Compiled models


@pytest.mark.parametrize("ran", [False, True], ids=["new", "that has run"])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "least squares", "permutation"])
def test_compiled_models_are_calibrated_as_they_are(tiny_vit: nn.Module, method: str, whole: bool, ran: bool) -> None:
    other, shown = copy.deepcopy(tiny_vit), images()
    METHODS[method](other, shown)
    compiled = torch.compile(tiny_vit, backend="eager") if whole else tiny_vit
    if not whole:
        for block in tiny_vit.blocks:
            block.compile(backend="eager")
    if ran:
        with torch.no_grad():
            compiled(shown[0])
    METHODS[method](compiled, shown)
    found = tiny_vit.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in other.state_dict().items())


# Weights without values


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt", "permutation", "update"])
def test_layers_on_meta_say_so(tiny_vit: nn.Module, method: str) -> None:
    if method == "update":
        prune(tiny_vit, "magnitude")
    for layer in (tiny_vit.blocks[0].mlp.fc1, tiny_vit.blocks[1].mlp.fc2):
        layer.to("meta")
    before = list(tiny_vit.named_modules())
    calls = {
        "permutation": lambda: permute_channels_(tiny_vit, "2:4"),
        "update": lambda: update_weights_(tiny_vit, calibration=images()),
    }
    call = calls.get(method, lambda: prune(tiny_vit, method, calibration=images()))
    with pytest.raises(ConfigError, match=r"^layers 'blocks\.0\.mlp\.fc1' and 'blocks\.1\.mlp\.fc2': on device 'meta'"):
        call()
    assert list(tiny_vit.named_modules()) == before
