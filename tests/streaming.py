"""Statistics streamed through a model, checked against those of the whole model; and awkward models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskllm4v.calibration import Hessian, InputNorm, default_forward, stream_statistics
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
