"""Statistics of layer inputs for one-shot pruning, streamed block by block through any model.

Where a model is a chain of blocks (each block's output is the next one's input, as in ViT) only one
block's activations are kept. Any other model (Swin, ConvNeXt, hierarchical ones) is run as a whole with
hooks on the layers at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from maskllm4v.errors import DataError

Forward = Callable[[nn.Module, Any], Any]
Propagate = Literal["dense", "pruned"]


class Statistic(Protocol):
    """Something summed over a layer's inputs."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    def update(self, rows: Tensor) -> None:
        """Take in float32 rows ``[tokens, in]``."""


class InputNorm:
    """‖x_j‖² of each input feature, ``[in]``, float32 (Wanda)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_of_squares = torch.zeros(in_features, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        self.sum_of_squares += rows.square().sum(0)
        self.rows += rows.shape[0]


class Hessian:
    """Σ x xᵀ over all input rows, ``[in, in]``, float32 (SparseGPT; half the Hessian of the layer's error)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_of_products = torch.zeros(in_features, in_features, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        self.sum_of_products.addmm_(rows.t(), rows)
        self.rows += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """H = 2/n · Σ x xᵀ."""
        return self.sum_of_products * (2 / self.rows)


@dataclass
class Unit:
    """Layers that are pruned together, and the block to run for their inputs (None: the whole model)."""

    layers: dict[str, nn.Linear]
    block: nn.Module | None


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(x)`` for a tensor, ``model(batch[0])`` for an (inputs, labels) pair, ``model(**batch)`` for a dict."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


@torch.no_grad()
def stream_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    statistic: type[Statistic],
    *,
    propagate: Propagate,
    forward: Forward = default_forward,
) -> Iterator[dict[str, Any]]:
    """Yield the statistics of one unit of layers after the other, in the order of execution.

    Whoever iterates may change the layers of a unit before asking for the next one. With
    ``propagate="pruned"`` later units then see the changed layers' outputs, as in SparseGPT and the Wanda
    paper; with ``"dense"`` all inputs are those of the untouched model.

    Args:
        model: put into evaluation mode for the time being.
        layers: the linear layers of interest, by module name.
        batches: calibration batches; kept in memory.
        statistic: :class:`InputNorm`, :class:`Hessian` or one of your own.
        propagate: see above.
        forward: how to run the model on a batch.

    Raises:
        DataError: no batch, or a layer is never reached.
    """
    batches = list(batches)
    if not batches:
        raise DataError("calibration: no batches given")
    with _evaluating(model):
        units = _units(layers, _find_chain(model, layers, batches[0], forward))
        first_block = next((unit.block for unit in units if unit.block is not None), None)
        outside = {n: layer for unit in units if unit.block is None for n, layer in unit.layers.items()}
        seen: dict[str, Any] = {}  # dense statistics of what lies outside the chain, before anything changes
        stream: list[tuple[Any, ...]] | None = None  # the arguments of the chain's next block, a batch each
        if propagate == "dense":
            if outside:
                seen = _observe(outside, statistic, lambda batch: forward(model, batch), batches)
            if first_block is not None:
                stream = [_inputs_of(first_block, model, batch, forward) for batch in batches]
        for unit in units:
            if unit.block is None:
                if propagate == "dense":
                    yield {name: seen[name] for name in unit.layers}
                else:
                    yield _observe(unit.layers, statistic, lambda batch: forward(model, batch), batches)
                continue
            if stream is None:
                stream = [_inputs_of(unit.block, model, batch, forward) for batch in batches]
            outputs: list[tuple[Any, ...]] = []

            def run(args: tuple[Any, ...], block: nn.Module = unit.block, into: list[Any] = outputs) -> None:
                into.append((block(*args), *args[1:]))

            found = _observe(unit.layers, statistic, run, stream)
            yield found
            if propagate == "pruned":
                outputs.clear()
                for args in stream:
                    run(args)
            stream = outputs


def _units(layers: Mapping[str, nn.Linear], chain: Mapping[str, nn.Module]) -> list[Unit]:
    """Neighbouring layers of one block make a unit; layers outside the chain keep their place."""
    return [
        Unit({name: layers[name] for name in names}, chain.get(group))
        for group, names in itertools.groupby(layers, key=_group)
    ]


def _group(name: str) -> str:
    """The block that a layer belongs to: its innermost numbered ancestor, such as ``layers.1.blocks.0``."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else name


class _ReachedError(Exception):
    """Ends a forward pass as soon as a block's input is known."""


def _inputs_of(block: nn.Module, model: nn.Module, batch: Any, forward: Forward) -> tuple[Any, ...]:
    caught: list[tuple[Any, ...]] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args)
        raise _ReachedError

    handle = block.register_forward_pre_hook(stop)
    try:
        forward(model, batch)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return caught[0]


def _find_chain(
    model: nn.Module, layers: Mapping[str, nn.Linear], batch: Any, forward: Forward
) -> dict[str, nn.Module]:
    """The blocks that feed one another and hold most of the layers, by name; empty where there are none.

    A chain is a ``ModuleList`` or ``Sequential`` whose children each ran once, in order, the one's output
    being the next one's first argument (the very same tensor), all other arguments unchanged.
    """
    groups = {_group(name) for name in layers}
    containers = [
        {f"{name}.{child}".lstrip("."): block for child, block in module.named_children()}
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    # A container of whole stages would be streamed too coarsely: its children must be the layers' blocks.
    containers = [c for c in containers if groups & c.keys()]
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(module, []).append((args, kwargs, output))

    blocks = {block for container in containers for block in container.values()}
    handles = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    try:
        forward(model, _one_sample(batch) if forward is default_forward else batch)
    finally:
        for handle in handles:
            handle.remove()

    def is_chain(container: Mapping[str, nn.Module]) -> bool:
        fed: tuple[Any, ...] | None = None  # what the next block has to be called with
        for block in container.values():
            if len(calls.get(block, ())) != 1:
                return False
            args, kwargs, output = calls[block][0]
            if kwargs or not args or not isinstance(output, Tensor):
                return False
            if fed is not None and (len(args) != len(fed) or any(a is not b for a, b in zip(args, fed, strict=True))):
                return False
            fed = (output, *args[1:])
        return True

    def held(container: Mapping[str, nn.Module]) -> int:
        return sum(_group(name) in container for name in layers)

    chains = [c for c in containers if 2 * held(c) > len(layers) and is_chain(c)]
    return max(chains, key=held, default={})


def _one_sample(batch: Any) -> Any:
    """The first sample of a batch of tensors: enough to see what feeds what."""
    if isinstance(batch, Tensor):
        return batch[:1]
    if isinstance(batch, Mapping):
        return {key: _one_sample(value) for key, value in batch.items()}
    return type(batch)(_one_sample(value) for value in batch) if isinstance(batch, tuple | list) else batch


def _observe(
    layers: Mapping[str, nn.Linear],
    statistic: type[Statistic],
    run: Callable[[Any], Any],
    batches: Iterable[Any],
) -> dict[str, Any]:
    """Run something on all batches and sum a statistic over the inputs of some layers."""
    found = {name: statistic(layer.in_features, layer.weight.device) for name, layer in layers.items()}
    reached: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            reached.add(name)
            with torch.autocast(args[0].device.type, enabled=False):
                found[name].update(args[0].detach().float().reshape(-1, args[0].shape[-1]))

        return take

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in reached]:
        raise DataError(f"calibration: layer {missing[0]!r} was never reached; exclude it")
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
