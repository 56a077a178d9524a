"""Statistics streamed through a model, checked against those of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.sequential import stream_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.sparsity.calibration import default_forward
from maskllm4v.sparsity.survey import prunable_matrices

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
    layers = prunable_matrices(model) if layers is None else layers
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
