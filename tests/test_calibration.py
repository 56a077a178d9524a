"""Input statistics: streamed block by block they must be those of the whole model."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from maskllm4v.calibration import Hessian, InputNorm, default_forward, stream_statistics
from maskllm4v.errors import DataError
from maskllm4v.surgery import prunable_linears

both_ways = pytest.mark.parametrize("propagate", ["dense", "pruned"])
Inputs = dict[str, Tensor]


def images(channels: int = 1, size: int = 8) -> list[Tensor]:
    """Three batches, not all of one size."""
    return [torch.randn(count, channels, size, size) for count in (3, 1, 2)]


def whole_model_inputs(model: nn.Module, names: Iterable[str], batches: Iterable[Any], forward: Callable) -> Inputs:
    """All input rows of some layers, ``[rows, in]`` in float64, seen while the model runs as a whole."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable:
        return lambda module, args: rows[name].append(args[0].detach().double().reshape(-1, module.in_features).clone())

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in rows]
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(seen) for name, seen in rows.items()}


def check(statistic: InputNorm | Hessian, rows: Tensor) -> None:
    assert statistic.rows == len(rows)
    if isinstance(statistic, Hessian):
        found, expected = statistic.sum_of_products, rows.t() @ rows
    else:
        found, expected = statistic.sum_of_squares, rows.square().sum(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def shrink(layer: nn.Linear) -> None:
    """What somebody may do to a layer while statistics are streamed: here, prune 3 of 4 inputs, hard."""
    with torch.no_grad():
        layer.weight[:, torch.arange(layer.in_features) % 4 != 0] = 0
        layer.weight.mul_(1.7)


def check_stream(
    model: nn.Module,
    batches: list[Any],
    propagate: str,
    statistic: type = InputNorm,
    layers: Mapping[str, nn.Linear] | None = None,
    forward: Callable = default_forward,
) -> list[list[str]]:
    """Stream, changing every layer as it comes by, and compare with whole runs; returns the units' names."""
    layers = prunable_linears(model) if layers is None else layers
    untouched = copy.deepcopy(model)
    units = []
    for unit in stream_statistics(model, layers, batches, statistic, propagate=propagate, forward=forward):
        expected = whole_model_inputs(untouched if propagate == "dense" else model, unit, batches, forward)
        for name, found in unit.items():
            check(found, expected[name])
        for name in unit:
            shrink(layers[name])
        units.append(list(unit))
    assert sorted(name for unit in units for name in unit) == sorted(layers)
    return units


# Models that are chains of blocks, and such that are not


@both_ways
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_vit(tiny_vit: nn.Module, propagate: str, statistic: type) -> None:
    units = check_stream(tiny_vit, images(), propagate, statistic)
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert units == [[f"blocks.{i}.{name}" for name in block] for i in range(2)] + [["head"]]


@both_ways
def test_swin(tiny_swin: nn.Module, propagate: str) -> None:
    check_stream(tiny_swin, images(3, 64), propagate)


@both_ways
def test_convnext(tiny_convnext: nn.Module, propagate: str) -> None:
    check_stream(tiny_convnext, images(3, 64), propagate)


@both_ways
def test_chain_amid_other_layers(propagate: str) -> None:
    # 24 of the 40 layers stand in stage 3, as in a real Swin-S or Swin-B.
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=8,
        depths=(1, 1, 6, 1),
        num_heads=(1, 1, 1, 1),
        img_size=64,
        window_size=2,
        num_classes=4,
    ).eval()
    check_stream(model, images(3, 64), propagate)


@both_ways
def test_some_layers_only(tiny_vit: nn.Module, propagate: str) -> None:
    layers = prunable_linears(tiny_vit, exclude=["head", "*.attn", "blocks.0.mlp.fc2"])
    units = check_stream(tiny_vit, images(), propagate, layers=layers)
    assert units == [["blocks.0.mlp.fc1"], ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]]


def runs_of_first_block(model: nn.Module, blocks: Callable[[nn.Module], nn.Module], propagate: str) -> int:
    """How often the first block is computed while all statistics are streamed over one batch."""
    runs = []
    blocks(model)[0].register_forward_hook(lambda *_: runs.append(1))
    layers = prunable_linears(model, exclude=["head*"])
    size = (2, 1, 8, 8) if isinstance(model, VisionTransformer) else (2, 3, 64, 64)
    for _ in stream_statistics(model, layers, [torch.randn(size)], InputNorm, propagate=propagate):
        pass
    return len(runs)


@both_ways
def test_vit_is_streamed_block_by_block(propagate: str) -> None:
    def runs(depth: int) -> int:
        model = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=depth, num_heads=1, num_classes=2
        )
        return runs_of_first_block(model, lambda m: m.blocks, propagate)

    # Once to see what feeds what, once to observe, once more where it has been pruned; however deep.
    assert runs(2) == runs(6) == (3 if propagate == "pruned" else 2)


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_hierarchical_models_are_run_as_a_whole(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"tiny_{kind}")
    first = (lambda m: m.layers[0].blocks) if kind == "swin" else (lambda m: m.stages[0].blocks)
    # Dense: all at once, after at most one look for a chain; pruned: once per unit, and there are ≥ 5.
    assert runs_of_first_block(copy.deepcopy(model), first, "dense") <= 2
    assert runs_of_first_block(model, first, "pruned") >= 5


class Block(nn.Module):
    def __init__(self, fc: nn.Linear | None = None) -> None:
        super().__init__()
        self.fc = fc or nn.Linear(8, 8)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return x + torch.tanh(self.fc(x + shift))


class Awkward(nn.Module):
    """A stack of blocks with something in it that a careless stream would trip over."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(torch.tanh(self.embed(x)))

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Plain(Awkward):
    pass


class BetweenBlocks(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = 2 * block(x)
        return x


class InPlaceBetweenBlocks(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).mul_(2)  # the very same tensor, with other contents
        return x


class SkipsAlong(Awkward):
    def run(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x)
        return x + first


class SecondArgument(Awkward):
    def run(self, x: Tensor) -> Tensor:
        shift = x.mean()
        for block in self.blocks:
            x = block(x, shift)
        return x


class ChangingArgument(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, float(i))
        return x


class Keyword(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift=0.5)
        return x


class Backwards(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class TwiceThrough(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class InPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(torch.tanh(self.fc(x)))


class TupleBlock(Block):
    def forward(self, x: Tensor | tuple[Tensor, int]) -> tuple[Tensor, int]:
        x, count = x if isinstance(x, tuple) else (x, 0)
        return x + torch.tanh(self.fc(x)), count + 1


class UnpackedTuples(Awkward):
    def run(self, x: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[0]


AWKWARD = {
    "plain": lambda: Plain([Block() for _ in range(3)]),
    "between blocks": lambda: BetweenBlocks([Block() for _ in range(3)]),
    "in place between blocks": lambda: InPlaceBetweenBlocks([Block() for _ in range(3)]),
    "skips along": lambda: SkipsAlong([Block() for _ in range(3)]),
    "second argument": lambda: SecondArgument([Block() for _ in range(3)]),
    "changing argument": lambda: ChangingArgument([Block() for _ in range(3)]),
    "keyword": lambda: Keyword([Block() for _ in range(3)]),
    "in place": lambda: Plain([InPlaceBlock() for _ in range(3)]),
    "tuples": lambda: UnpackedTuples([TupleBlock() for _ in range(3)]),
    "sequential": lambda: nn.Sequential(*[Block() for _ in range(3)]),
    "bare linears": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
}


@both_ways
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_models(kind: str, propagate: str) -> None:
    check_stream(AWKWARD[kind]().eval(), [torch.randn(n, 8) for n in (3, 2)], propagate)


@both_ways
@pytest.mark.parametrize("excluded", ["blocks.0", "blocks.1", "blocks.2"])
@pytest.mark.parametrize("kind", ["plain", "second argument", "between blocks"])
def test_block_without_layers_of_interest_still_counts(kind: str, excluded: str, propagate: str) -> None:
    model = AWKWARD[kind]().eval()
    layers = prunable_linears(model, exclude=[excluded, "embed"])
    assert len(layers) == 2
    check_stream(model, [torch.randn(n, 8) for n in (3, 2)], propagate, layers=layers)


@both_ways
@pytest.mark.parametrize("kind", ["plain", "between blocks", "bare linears"])
def test_layers_may_be_replaced_on_the_way(kind: str, propagate: str) -> None:
    model = AWKWARD[kind]().eval()
    untouched, batches = copy.deepcopy(model), [torch.randn(n, 8) for n in (3, 2)]
    for unit in stream_statistics(model, prunable_linears(model), batches, InputNorm, propagate=propagate):
        seen_by = untouched if propagate == "dense" else model
        expected = whole_model_inputs(seen_by, unit, batches, default_forward)
        for name, found in unit.items():
            check(found, expected[name])
        for name in unit:
            layer = copy.deepcopy(model.get_submodule(name))
            shrink(layer)
            model.set_submodule(name, layer)


@pytest.mark.parametrize("kind", ["twice through", "shared layer"])
def test_layer_used_more_than_once_is_seen_each_time(kind: str) -> None:
    shared = nn.Linear(8, 8)
    model = TwiceThrough([Block() for _ in range(3)]) if kind == "twice through" else None
    model = model or Plain([Block(shared), Block(), Block(shared)])
    check_stream(model.eval(), [torch.randn(n, 8) for n in (3, 2)], "dense")


class HeadFirst(Plain):
    """Registers its head before its body."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        modules = list(self._modules.items())
        self._modules.clear()
        self._modules.update([("head", nn.Linear(8, 4)), *modules])

    def run(self, x: Tensor) -> Tensor:
        return self.head(super().run(x))


@pytest.mark.parametrize(
    ("model", "order"),
    [
        (lambda: HeadFirst([Block() for _ in range(2)]), ["embed", "blocks.0.fc", "blocks.1.fc", "head"]),
        (lambda: Backwards([Block() for _ in range(2)]), ["embed", "blocks.1.fc", "blocks.0.fc"]),
    ],
    ids=["head first", "backwards"],
)
@both_ways
def test_units_come_in_order_of_execution(model: Callable[[], nn.Module], order: list[str], propagate: str) -> None:
    units = check_stream(model().eval(), [torch.randn(4, 8)], propagate)
    assert [name for unit in units for name in unit] == order


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
    layers = prunable_linears(tiny_vit)
    expected = whole_model_inputs(tiny_vit, layers, batches, lambda model, x: model(x))
    stream = stream_statistics(tiny_vit, layers, [as_batch(x) for x in batches], InputNorm, propagate="dense")
    for unit in stream:
        for name, found in unit.items():
            check(found, expected[name])


@both_ways
def test_generator_of_batches(tiny_vit: nn.Module, propagate: str) -> None:
    stream = stream_statistics(
        tiny_vit, prunable_linears(tiny_vit), (x for x in images()), InputNorm, propagate=propagate
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
        next(stream_statistics(tiny_vit, prunable_linears(tiny_vit), batches, InputNorm, propagate=propagate))


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
        model, prunable_linears(model), [torch.randn(2, 8)], InputNorm, propagate=propagate, forward=forward
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
    stream = stream_statistics(tiny_vit, prunable_linears(tiny_vit), images(), InputNorm, propagate=propagate)
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
    layers, batches = prunable_linears(tiny_vit), images()
    expected = whole_model_inputs(copy.deepcopy(tiny_vit).eval(), layers, batches, default_forward)
    for unit in stream_statistics(tiny_vit, layers, batches, InputNorm, propagate=propagate):
        for name, found in unit.items():
            check(found, expected[name])


@both_ways
def test_caller_keeps_gradients_enabled(tiny_vit: nn.Module, propagate: str) -> None:
    for unit in stream_statistics(tiny_vit, prunable_linears(tiny_vit), images(), Hessian, propagate=propagate):
        assert torch.is_grad_enabled()
        assert not any(statistic.sum_of_products.requires_grad for statistic in unit.values())


@both_ways
def test_batches_are_left_alone(tiny_vit: nn.Module, propagate: str) -> None:
    batches = images()
    before = [x.clone() for x in batches]
    list(stream_statistics(tiny_vit, prunable_linears(tiny_vit), batches, InputNorm, propagate=propagate))
    assert all(torch.equal(x, y) for x, y in zip(batches, before, strict=True))


def test_own_statistic(tiny_vit: nn.Module) -> None:
    class Largest:
        def __init__(self, in_features: int, device: torch.device) -> None:
            self.value = torch.zeros(in_features, device=device)

        def update(self, rows: Tensor) -> None:
            assert rows.dtype is torch.float32
            assert rows.dim() == 2
            self.value = torch.maximum(self.value, rows.abs().amax(0))

    layers, batches = prunable_linears(tiny_vit), images()
    expected = whole_model_inputs(tiny_vit, layers, batches, default_forward)
    for unit in stream_statistics(tiny_vit, layers, batches, Largest, propagate="dense"):
        for name, found in unit.items():
            torch.testing.assert_close(found.value.double(), expected[name].abs().amax(0), rtol=1e-5, atol=1e-5)


def test_hessian_mean() -> None:
    statistic = Hessian(3, torch.device("cpu"))
    first, second = torch.randn(5, 3), torch.randn(2, 3)
    statistic.update(first)
    statistic.update(second)
    rows = torch.cat([first, second]).double()
    expected = sum(2 * torch.outer(row, row) for row in rows) / 7
    torch.testing.assert_close(statistic.mean.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(statistic.mean, statistic.mean)
