"""Input statistics: what their caller can count on, whatever the model."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from awkward_models import AWKWARD, BetweenBlocks, Block, Plain
from streaming import both_ways, check, check_stream, images, whole_model_inputs
from torch import Tensor, nn

from maskllm4v.oneshot.activations.sequential import stream_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.sparsity.calibration import default_forward
from maskllm4v.sparsity.survey import prunable_matrices
from maskllm4v.utils.errors import DataError

# What the caller can count on


@pytest.mark.parametrize(
    "as_batch",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, torch.zeros(len(x))],
        lambda x: {"x": x},
        lambda x: namedtuple("Batch", "image label")(x, torch.zeros(len(x))),
    ],
    ids=["tensor", "tuple", "list", "dict", "namedtuple"],
)
def test_batches(tiny_vit: nn.Module, as_batch: Callable[[Tensor], Any]) -> None:
    batches = images()
    layers = prunable_matrices(tiny_vit)
    expected = whole_model_inputs(tiny_vit, layers, batches, lambda model, x: model(x))
    stream = stream_statistics(tiny_vit, layers, [as_batch(x) for x in batches], InputNorm, propagate="dense")
    for unit in stream:
        for name, found in unit.items():
            check(found, expected[name])


@both_ways
def test_generator_of_batches(tiny_vit: nn.Module, propagate: str) -> None:
    stream = stream_statistics(
        tiny_vit, prunable_matrices(tiny_vit), (x for x in images()), InputNorm, propagate=propagate
    )
    assert [unit.popitem()[1].rows for unit in stream] == [6 * 16, 6 * 16, 6]


@both_ways
def test_own_forward(tiny_vit: nn.Module, propagate: str) -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["pixels"].flip(0) * 2)

    check_stream(tiny_vit, [{"pixels": x, "id": 7} for x in images()], propagate, forward=forward)


@both_ways
@pytest.mark.parametrize("kind", ["plain", "sequential", "in place"])
@pytest.mark.parametrize("everything", [False, True], ids=["batches", "everything"])
def test_inference_mode(kind: str, propagate: str, everything: bool) -> None:
    model = AWKWARD[kind]().eval()
    with torch.inference_mode():
        batches = [torch.randn(n, 8) for n in (3, 2)]
    with torch.inference_mode(everything):
        check_stream(model, batches, propagate)


@both_ways
@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_batches(tiny_vit: nn.Module, propagate: str, batches: Iterable[Any]) -> None:
    with pytest.raises(DataError, match="no batches"):
        next(stream_statistics(tiny_vit, prunable_matrices(tiny_vit), batches, InputNorm, propagate=propagate))


class WithSpare(Block):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


@both_ways
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: Plain([Block(), WithSpare(), Block()]), r"blocks\.1\.spare"),
        (lambda: BetweenBlocks([Block(), WithSpare()]), r"blocks\.1\.spare"),
        (lambda: nn.ModuleDict({"body": Plain([Block()]), "spare": nn.Linear(8, 8)}), "spare"),
    ],
    ids=["in a chain", "in no chain", "outside"],
)
def test_layer_that_is_never_reached(model: Callable[[], nn.Module], name: str, propagate: str) -> None:
    model = model().train()

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model["body"](batch) if isinstance(model, nn.ModuleDict) else model(batch)

    stream = stream_statistics(
        model, prunable_matrices(model), [torch.randn(2, 8)], InputNorm, propagate=propagate, forward=forward
    )
    with pytest.raises(DataError, match=f"{name}.*never reached"):
        list(stream)
    assert all(module.training for module in model.modules())


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@both_ways
@pytest.mark.parametrize("ending", ["end", "closed", "error"])
def test_training_flags_and_hooks_are_restored(tiny_vit: nn.Module, propagate: str, ending: str) -> None:
    tiny_vit.train()
    tiny_vit.blocks[1].eval()
    tiny_vit.blocks[0].mlp.train()
    before = flags(tiny_vit)
    stream = stream_statistics(tiny_vit, prunable_matrices(tiny_vit), images(), InputNorm, propagate=propagate)
    next(stream)
    assert not any(flags(tiny_vit))
    if ending == "end":
        list(stream)
    elif ending == "closed":
        stream.close()
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError)
    assert flags(tiny_vit) == before
    assert hooks(tiny_vit) == 0


@both_ways
def test_statistics_are_taken_in_evaluation_mode(tiny_vit: nn.Module, propagate: str) -> None:
    for block in tiny_vit.blocks:
        block.attn.proj_drop.p = block.mlp.drop1.p = 0.5
    tiny_vit.train()
    layers, batches = prunable_matrices(tiny_vit), images()
    expected = whole_model_inputs(copy.deepcopy(tiny_vit).eval(), layers, batches, default_forward)
    for unit in stream_statistics(tiny_vit, layers, batches, InputNorm, propagate=propagate):
        for name, found in unit.items():
            check(found, expected[name])


@both_ways
def test_caller_keeps_gradients_enabled(tiny_vit: nn.Module, propagate: str) -> None:
    for unit in stream_statistics(tiny_vit, prunable_matrices(tiny_vit), images(), Hessian, propagate=propagate):
        assert torch.is_grad_enabled()
        assert not any(statistic.sum_of_products.requires_grad for statistic in unit.values())


@both_ways
def test_batches_are_left_alone(tiny_vit: nn.Module, propagate: str) -> None:
    batches = images()
    before = [x.clone() for x in batches]
    list(stream_statistics(tiny_vit, prunable_matrices(tiny_vit), batches, InputNorm, propagate=propagate))
    assert all(torch.equal(x, y) for x, y in zip(batches, before, strict=True))


def test_own_statistic(tiny_vit: nn.Module) -> None:
    class Largest:
        def __init__(self, in_features: int, device: torch.device) -> None:
            self.value = torch.zeros(in_features, device=device)

        def update(self, rows: Tensor) -> None:
            assert rows.dtype is torch.float32
            assert rows.dim() == 2
            self.value = torch.maximum(self.value, rows.abs().amax(0))

    layers, batches = prunable_matrices(tiny_vit), images()
    expected = whole_model_inputs(tiny_vit, layers, batches, default_forward)
    for unit in stream_statistics(tiny_vit, layers, batches, Largest, propagate="dense"):
        for name, found in unit.items():
            torch.testing.assert_close(found.value.double(), expected[name].abs().amax(0), rtol=1e-5, atol=1e-5)


@both_ways
def test_nothing_is_computed_that_nobody_needs(tiny_vit: nn.Module, propagate: str) -> None:
    done: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: done.__setitem__(name, done.get(name, 0) + 1)

    layers = prunable_matrices(tiny_vit, exclude=["head"])
    for name, layer in layers.items():
        layer.module.register_forward_hook(count(name))
    for _ in stream_statistics(tiny_vit, layers, images()[:1], InputNorm, propagate=propagate):
        pass
    again = propagate == "pruned"
    # Once to see what feeds what; once for the statistics, but for what lies behind the last input, where outputs
    # are not needed; once more where they are needed as pruned.
    assert (done["blocks.0.attn.qkv"], done["blocks.0.mlp.fc2"]) == (2 + again, 2)
    assert (done["blocks.1.attn.qkv"], done["blocks.1.mlp.fc2"]) == (2, 1)
