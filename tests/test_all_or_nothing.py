"""Functions that change a model leave it as it was after an error, or Ctrl-C, wherever that comes."""

from __future__ import annotations

import gc
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupted import lines, whole
from timm.layers import Mlp
from torch import Tensor, nn

from maskllm4v import (
    LearnableMaskedLinear,
    apply_masks_,
    apply_permutations_,
    current_masks,
    fold_,
    make_learnable,
    permute_channels_,
    prune,
    replace_linear_with_,
    update_weights_,
)

X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Linear layers, attention, a tie, and a hook of the user's; some of it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.attention = Mlp(16, 32), nn.MultiheadAttention(16, 2, batch_first=True)
        self.last, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.last.weight
        self.mlp.fc2.register_forward_hook(lambda module, args, output: None)
        self.attention.register_forward_pre_hook(lambda module, args: None)
        self.last.bias.requires_grad_(False)
        self.train()
        self.mlp.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        x = x + self.attention(x, x, x)[0]
        return x + self.again(torch.tanh(self.last(x)))


def dense() -> nn.Module:
    torch.manual_seed(1)
    return Small()


def pruned() -> nn.Module:
    model = dense()
    prune(model, "magnitude")
    return model


def learned() -> nn.Module:
    return make_learnable(dense(), None, pattern="2:4")


ORDERS = {"mlp.fc2": torch.arange(32).flip(0), "attention.out_proj": torch.arange(8).flip(0).repeat(2)}
ORDERS["attention.out_proj"][8:] += 8
MASK = torch.tensor([False, True, True, False]).repeat(32, 4)
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "prune": (dense, lambda model: prune(model, "magnitude")),
    "prune, calibrated": (dense, lambda model: prune(model, "sparsegpt", calibration=[X], update_weights=True)),
    "prune what is pruned": (pruned, lambda model: prune(model, "wanda", pattern="1:4", calibration=[X])),
    "prune what is learned": (learned, lambda model: prune(model, "ria", calibration=[X])),
    "make_learnable": (dense, lambda model: make_learnable(model, None, pattern="2:4")),
    "make pruned masks learnable": (pruned, lambda model: make_learnable(model, current_masks(model), pattern="2:4")),
    "replace_linear_with_": (dense, lambda model: replace_linear_with_(model, LearnableMaskedLinear)),
    "apply_masks_": (learned, lambda model: apply_masks_(model, {"mlp.fc1": MASK}, "2:4")),
    "fold_": (learned, fold_),
    "permute_channels_": (dense, lambda model: permute_channels_(model, "2:4", calibration=[X])),
    "apply_permutations_": (dense, lambda model: apply_permutations_(model, ORDERS)),
    "update_weights_": (pruned, lambda model: update_weights_(model, calibration=[X])),
    "update_weights_, sparsegpt": (pruned, lambda model: update_weights_(model, "sparsegpt", calibration=[X])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_interrupted_anywhere(change: str) -> None:
    """At points all over the way, and at the last lines one by one, where most is changed already."""
    build, run = CHANGES[change]
    run(build())  # what is made once and kept for later
    model = build()
    before = whole(model)
    count = lines(lambda: run(model))
    assert whole(model) != before
    for at in {*range(1, count, count // 8), *range(count - 8, count + 1)}:
        model = build()
        before = whole(model)
        with pytest.raises(KeyboardInterrupt):
            lines(lambda model=model: run(model), at)
        assert whole(model) == before, at
    run(model)  # nothing stays behind that a second try would stumble over


class PlannedError(Exception):
    """What a test lets happen."""


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails when it has been called so many times."""
    left = iter(range(calls))

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise PlannedError
        return function(*arguments, **named)

    return counted


CALIBRATED: dict[str, tuple[Callable[[], nn.Module], Callable[..., object]]] = {
    "prune": (learned, lambda model, **how: prune(model, "sparsegpt", update_weights=True, **how)),
    "permute_channels_": (dense, lambda model, **how: permute_channels_(model, "2:4", **how)),
    "update_weights_": (pruned, update_weights_),
}


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("change", CALIBRATED)
def test_a_forward_that_fails(change: str, calls: int) -> None:
    build, run = CALIBRATED[change]
    model = build()
    before = whole(model)
    with pytest.raises(PlannedError):
        run(model, calibration=[X, X, X], forward=after(calls, lambda model, x: model(x)))
    assert whole(model) == before


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ("prune", "maskllm4v.oneshot.prune.attach_"),
        ("prune, calibrated", "maskllm4v.oneshot.prune.attach_"),
        ("make_learnable", "maskllm4v.sparsity.surgery.attach_"),
        ("fold_", "maskllm4v.sparsity.surgery.detach_"),
        ("permute_channels_", "maskllm4v.oneshot.permute.best_order"),
        ("permute_channels_", "maskllm4v.sparsity.channels.Channels.permute_"),
        ("apply_permutations_", "maskllm4v.sparsity.channels.Channels.permute_"),
        ("update_weights_", "maskllm4v.oneshot.weight_update.attach_"),
    ],
)
@pytest.mark.parametrize("calls", [0, 1])
def test_a_step_that_fails(change: str, used: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build, run = CHANGES[change]
    model = build()
    before = whole(model)
    found: Any = pkgutil.resolve_name(used)
    if used.endswith("permute_"):
        calls += 2  # those of the trials
    monkeypatch.setattr(used, after(calls, found))
    with pytest.raises(PlannedError):
        run(model)
    assert whole(model) == before


@pytest.mark.parametrize("change", CALIBRATED)
def test_a_mode_that_cannot_be_set(change: str) -> None:
    build, run = CALIBRATED[change]
    model = build()
    model.last.train = after(0, model.last.train)
    before = whole(model)
    with pytest.raises(PlannedError):
        run(model, calibration=[X])
    assert whole(model) == before


@pytest.mark.parametrize("run", [prune, permute_channels_])
def test_who_is_told_may_fail(run: Callable[..., object]) -> None:
    model = dense()
    before = whole(model)
    with pytest.raises(PlannedError):
        run(model, *(["magnitude"] if run is prune else ["2:4"]), tell=after(0, print))
    assert whole(model) == before


@pytest.mark.parametrize(
    "run",
    [
        lambda model: prune(model, "magnitude"),
        lambda model: make_learnable(model, None, pattern="2:4"),
        lambda model: replace_linear_with_(model, LearnableMaskedLinear),
    ],
)
def test_warnings_that_are_errors(run: Callable[[nn.Module], object]) -> None:
    """As pytest makes them here."""
    model = nn.ModuleDict({"fits": nn.Linear(16, 16), "rest": nn.Conv2d(16, 64, 3)})
    before = whole(model)
    with pytest.raises(UserWarning, match="masks cover only"):
        run(model)
    assert whole(model) == before


@pytest.mark.parametrize(
    ("change", "module"),
    [("prune, calibrated", "maskllm4v.oneshot.prune"), ("update_weights_", "maskllm4v.oneshot.weight_update")],
)
def test_modes_that_are_set_after_a_failure_stay(change: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was under way ends with the error, not when the last who holds it forgets it."""
    build, run = CHANGES[change]
    model = build()
    monkeypatch.setattr(f"{module}.attach_", after(0, print))
    monkeypatch.setattr(f"{module}.bar", lambda items, description: items)  # visible ones, too, close nothing
    with pytest.raises(PlannedError) as error:
        run(model)
    model.eval()
    del error
    gc.collect()
    assert not any(module.training for module in model.modules())
