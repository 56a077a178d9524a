"""Whether the channels of a block may change places, found out by trying it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.channel_blocks import Kind
from maskllm4v.sparsity.channels import Channels

ROUNDING = 1e-9  # by which outputs of order 1 may differ in float64; those of a wrong order differ by order 1


def fault(block: nn.Module, kind: Kind, channels: Channels) -> str | None:
    """Why the channels of a block may not be permuted; None if they may.

    A copy of it with random weights has to give the same outputs, all of them, with its channels permuted as without,
    and to need all of its weights, of each expert, for them.
    """
    noise = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(block)
    twin.to("cpu", torch.float64)  # in place, like eval, whose overrides in timm return nothing
    twin.eval()
    twin.requires_grad_()
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for weight in weights.values():  # nothing may agree because it happens to be zero or one
            random = torch.randn(weight.shape, generator=noise, dtype=torch.float64)
            weight.copy_(random / prod(weight.shape[-1:]) ** 0.5)
        for buffer in twin.buffers():
            if buffer.is_floating_point():  # variances are positive
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=noise, dtype=torch.float64))
    own = kind.channels(twin)
    assert own is not None  # it is a copy
    try:
        with torch.enable_grad():
            inputs = kind.inputs(twin, noise)
            before = _run(twin, inputs)
            total = torch.stack([output.double().sum() for output in before]).sum()
            needed = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
            own.permute_(_random_order(channels, noise))
            after = _run(twin, inputs)
        same = len(before) == len(after) and all(map(_agree, before, after))
    except Exception as error:  # whatever a block of somebody else's stumbles over
        said = str(error).partition("\n")[0]
        return f"its {type(block).__name__} cannot be tried out alone ({said or type(error).__name__})"
    if idle := next(_idle(weights, needed, own), None):
        return f"its {type(block).__name__} does not use {idle} when it is tried out alone"
    return None if same else f"the outputs of its {type(block).__name__} depend on their order"


def _run(block: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """All numbers that come out."""
    return list(_floating(block(*(one.clone() for one in inputs))))


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _floating(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _floating(one)


def _agree(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=ROUNDING, atol=ROUNDING)


def _random_order(channels: Channels, noise: torch.Generator) -> Tensor:
    size = channels.count // channels.parts
    orders = [
        torch.cat([torch.randperm(size, generator=noise) + i * size for i in range(channels.parts)])
        for _ in range(channels.experts or 1)
    ]
    return orders[0] if channels.experts is None else torch.stack(orders)


def _idle(weights: Mapping[str, Tensor], needed: tuple[Tensor | None, ...], channels: Channels) -> Iterator[str]:
    """Weights, and experts of a stack of them, on which no output depends."""
    stacks = {id(place.tensor) for place in channels.places if channels.experts is not None}
    for (name, weight), gradient in zip(weights.items(), needed, strict=True):
        if gradient is None:
            yield repr(name)
        elif id(weight) in stacks:
            yield from (f"expert {i} of {name!r}" for i, one in enumerate(gradient) if not one.any())
