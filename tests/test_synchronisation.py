"""A training step asks the device for no number, and computes no gradient that nobody uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from regression import Regression, learnable, settings
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.surgery import make_learnable
from maskllm4v.training.mask_learning import MaskLearner
from maskllm4v.training.trainer import run

# What waits for a GPU. Tensor.numpy needs no watching: a GPU's tensors have none.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_static", "masked_select"),
    *("_unique2", "unique_consecutive", "unique_dim", "repeat_interleave", "bincount"),
}
ASKING = {"item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__format__"}


class Operators(TorchDispatchMode):
    """What reaches PyTorch's operators: forward, backward, optimiser."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if name in WAITING or by_mask:
            self.note(name)
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """What Python asks tensors for; on a CPU some of it takes no operator."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ASKING:
            self.note(function.__name__)
        return function(*args, **(kwargs or {}))


class Watched(MaskLearner):
    """Remembers what was waited for in which step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.seen: dict[int, list[str]] = {-1: []}
        super().__init__(*args, **options)

    def begin_step(self, step: int, done: float, lr: float) -> None:
        self.seen[step] = []
        super().begin_step(step, done, lr)

    def note(self, name: str) -> None:
        self.seen[max(self.seen)].append(name)


def waited_for(model: nn.Module | None = None, **changes: Any) -> dict[int, list[str]]:
    """What a run of 11 steps waits for, step by step; 0, 5 and 10 are points of the curve."""
    run_settings = settings(steps=11, log_every=5, **changes)
    task = Regression()
    learner = Watched(learnable(model), task, run_settings, prior=None, row="masks", on_point=None)
    with Operators(learner.note), Methods(learner.note):
        run(learner, task, run_settings, seed=0)
    del learner.seen[-1]  # what came before the first step
    return learner.seen


class Asking(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else y[y > -torch.inf].view(y.shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_grad": 1.0, "ema": 0.9, "regularisation": 0.1},
        {"accumulate": 2, "amp": "bf16", "distillation": 0.5},
        {"anneal": "epoch", "optimizer": "lion"},
    ],
)
def test_steps_wait_for_nothing(changes: dict[str, Any]) -> None:
    seen = waited_for(**changes)
    assert sorted(seen) == list(range(11))
    assert {step for step, names in seen.items() if names} == {0, 5, 10}
    assert seen[5].count("tolist") == 1  # is the loss still finite?


def test_waiting_is_seen() -> None:
    model = Asking(*Regression().build_model(0))
    seen = waited_for(model)
    assert all({"__bool__", "_local_scalar_dense"} <= set(names) for names in seen.values())
    assert any("index" in names for names in seen.values())


# Frozen weights


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_frozen_weights_cost_no_gradient(amp: bool, tiny_vit: nn.Module) -> None:
    model = make_learnable(tiny_vit, None, pattern="2:4", exclude=["head"]).train()
    nn.init.normal_(model.head.weight, std=0.1)
    below: list[Tensor] = []
    model.patch_embed.register_forward_hook(lambda *args: below.append(args[2]))
    products: list[tuple[str, Any]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products.append((function.overloadpacket.__name__, args))
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        outputs = model(torch.randn(3, 1, 8, 8))
    with Products():
        outputs.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith("logits"), name
    assert len(below) == 1
    assert not below[0].requires_grad
    # A learnable layer's backward takes two products, for its masked weight and for its inputs, but for the first
    # layer, whose inputs depend on nothing learned; the frozen head's takes one.
    assert sum(name == "mm" for name, _ in products) == 2 * 8 - 1 + 1
    assert not any(name == "convolution_backward" for name, _ in products)
    # nor do frozen normalisations compute gradients for their own parameters
    masks = [args[-1] for name, args in products if name == "native_layer_norm_backward"]
    assert masks
    assert all(mask == [True, False, False] for mask in masks)


def test_draws_are_made_from_numbers_on_the_host() -> None:
    mask = learnable()[0].weight_mask
    mask.draw, mask.tau, mask.scaling = NoiseKey(step=4), 2.0, 3.0
    assert {t.device.type for t in (mask._key, mask._tau, mask._scaling)} == {"cpu"}
    moved = mask.to("meta")
    assert {t.device.type for t in (moved._key, moved._tau, moved._scaling)} == {"cpu"}
