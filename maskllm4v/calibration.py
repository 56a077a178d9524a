"""Statistics of layer inputs for one-shot pruning, streamed block by block through any model.

Where a model is a chain of blocks (each block's output is the next one's input, as in ViT) only one
block's activations are kept. Any other model (Swin, ConvNeXt, hierarchical ones) is run as a whole with
hooks on the layers at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from maskllm4v.distributed import sum_
from maskllm4v.errors import DataError
from maskllm4v.processes import world_size

Forward = Callable[[nn.Module, Any], Any]
Propagate = Literal["dense", "pruned"]


class Statistic(Protocol):
    """Something summed over a layer's inputs."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    def update(self, rows: Tensor) -> None:
        """Take in float32 rows ``[tokens, in]``."""

    def combine(self) -> None:
        """Add up what all processes have taken in."""


class InputNorm:
    """‖x_j‖² of each input feature, ``[in]``, float32 (Wanda)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_of_squares = torch.zeros(in_features, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        self.sum_of_squares += rows.square().sum(0)
        self.rows += rows.shape[0]

    def combine(self) -> None:
        rows = torch.tensor(self.rows, device=self.sum_of_squares.device)
        sum_(self.sum_of_squares, rows)
        self.rows = int(rows)


SET_ONE_BY_ONE = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since torch 2.9
WIDE = 512  # from this width on, half of a symmetric product is worth several smaller calls
STRIP = 256


class Hessian:
    """Σ x xᵀ over all input rows, ``[in, in]``, float32 (SparseGPT; half the Hessian of the layer's error).

    Read :attr:`mean`: of a wide layer on a CPU, ``sum_of_products`` holds only strips of rows from the diagonal
    on, half the work; a GPU needs the whole product at once to be busy.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_of_products = torch.zeros(in_features, in_features, device=device)
        self.rows = 0
        height = STRIP if in_features >= WIDE and device.type == "cpu" else in_features
        self._strips = [(start, min(start + height, in_features)) for start in range(0, in_features, height)]

    def update(self, rows: Tensor) -> None:
        with full_float32(rows.device):
            for start, stop in self._strips:
                self.sum_of_products[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])
        self.rows += rows.shape[0]

    def combine(self) -> None:
        rows = torch.tensor(self.rows, device=self.sum_of_products.device)
        sum_(self.sum_of_products, rows)
        self.rows = int(rows)

    @property
    def mean(self) -> Tensor:
        """H = 2/n · Σ x xᵀ, a new tensor."""
        mean = self.sum_of_products * (2 / self.rows)
        for start, stop in self._strips:
            mean[stop:, start:stop] = mean[start:stop, stop:].t()
        return mean


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 are summed in float32, even where TF32, bfloat16 or autocast is allowed.

    Settings of the whole process change for the time being, and only if they allow less than float32.
    """
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, which this function refuses to sum up
        allowed = ""
    with torch.autocast(device.type, enabled=False):
        if allowed == "highest":
            yield
            return
        backends = torch.backends
        single = [backends.cuda.matmul, backends.mkldnn.matmul] if SET_ONE_BY_ONE else []  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in single]
        try:
            if allowed:
                torch.set_float32_matmul_precision("highest")
            else:
                for backend in single:
                    backend.fp32_precision = "ieee"
            yield
        finally:
            if allowed:
                torch.set_float32_matmul_precision(allowed)
            for backend, precision in zip(single, before, strict=True):
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision


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
        order, chain = _probe(model, layers, batches[0], forward)
        units = _units({name: layers[name] for name in order}, chain)
        blocks = iter(chain.values())
        seen: dict[str, Any] = {}  # dense statistics of what lies outside the chain, before anything changes
        stream: list[tuple[Any, ...]] | None = None  # the arguments of the chain's next block, a batch each
        if propagate == "dense":
            outside = {n: layer for unit in units if unit.block is None for n, layer in unit.layers.items()}
            if outside:
                seen = _observe(outside, statistic, lambda batch: forward(model, batch), batches)
            if chain:
                stream = _inputs_of(next(iter(chain.values())), model, batches, forward)
        last = max((i for i, unit in enumerate(units) if unit.block is not None), default=-1)
        for i, unit in enumerate(units):
            if unit.block is None:
                if propagate == "dense":
                    yield {name: seen[name] for name in unit.layers}
                else:
                    yield _observe(unit.layers, statistic, lambda batch: forward(model, batch), batches)
                continue
            if stream is None:
                stream = _inputs_of(next(iter(chain.values())), model, batches, forward)
            for block in blocks:
                if block is unit.block:
                    break
                stream = [_step(block, args) for args in stream]  # a block without layers of interest
            if propagate == "pruned" or i == last:  # nobody needs what comes out of the block as it is
                yield _observe(unit.layers, statistic, partial(_step, unit.block), stream, inputs_only=True)
                stream = [] if i == last else [_step(unit.block, args) for args in stream]
                continue
            outputs: list[tuple[Any, ...]] = []

            def run(args: tuple[Any, ...], block: nn.Module = unit.block, into: list[Any] = outputs) -> None:
                into.append(_step(block, args))

            yield _observe(unit.layers, statistic, run, stream)
            stream = outputs


def _step(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the next block."""
    return (block(*args), *args[1:])


def _units(layers: Mapping[str, nn.Linear], chain: Mapping[str, nn.Module]) -> list[Unit]:
    """Layers of one block that follow one another make a unit; layers outside the chain keep their place."""
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


def _inputs_of(block: nn.Module, model: nn.Module, batches: Iterable[Any], forward: Forward) -> list[tuple[Any, ...]]:
    """The arguments that a block is called with, for each batch."""
    caught: list[tuple[Any, ...]] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args)
        raise _ReachedError

    handle = block.register_forward_pre_hook(stop)
    try:
        for batch in batches:
            with suppress(_ReachedError):
                forward(model, batch)
    finally:
        handle.remove()
    return caught


class _Chain:
    """Watches whether the children of a container feed one another, one tensor held at a time.

    They do if each runs once, in order, the one's output being the next one's first argument (the very same
    tensor, not changed in place meanwhile) and all other arguments staying the same.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.blocks, self.ahead = blocks, list(blocks.values())
        self.unbroken = True
        self._entered: tuple[int, ...] = ()
        self._fed: tuple[Any, ...] | None = None
        self._versions: tuple[int, ...] = ()

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        in_order = bool(self.ahead) and block is self.ahead.pop(0)
        self.unbroken &= in_order and not kwargs and bool(args)
        if self._fed is not None:
            same = len(args) == len(self._fed) and all(a is b for a, b in zip(args, self._fed, strict=True))
            self.unbroken &= same and _versions(args) == self._versions
        self._entered = _versions(args)

    def leave(self, args: tuple[Any, ...], output: Any) -> None:
        traceable = isinstance(output, Tensor) and not output.is_inference()  # those count no changes
        self.unbroken &= traceable and _versions(args) == self._entered
        self._fed = (output, *args[1:])
        self._versions = _versions(self._fed)


def _versions(values: tuple[Any, ...]) -> tuple[int, ...]:
    """How often each tensor was changed in place."""
    return tuple(value._version for value in values if isinstance(value, Tensor) and not value.is_inference())


def _probe(
    model: nn.Module, layers: Mapping[str, nn.Linear], batch: Any, forward: Forward
) -> tuple[list[str], dict[str, nn.Module]]:
    """Run one batch: the layers in order of their first call, and the chain of blocks that holds most of them.

    Where no container of the layers' blocks is a chain (:class:`_Chain`), the second is empty.
    """
    groups = {_group(name) for name in layers}
    linears = {id(layer) for layer in layers.values()}
    chains = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            blocks = {f"{name}.{child}".lstrip("."): block for child, block in module.named_children()}
            # A container of whole stages would be streamed too coarsely: its children must be the layers' blocks.
            if groups & blocks.keys() and not any(id(block) in linears for block in blocks.values()):
                chains.append(_Chain(blocks))
    calls: dict[str, int] = {}
    handles = []

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    def leave(chain: _Chain) -> Callable[..., None]:
        return lambda _, args, output: chain.leave(args, output)

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(count(name)))
    for chain in chains:
        for block in chain.blocks.values():
            handles.append(block.register_forward_pre_hook(chain.enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave(chain)))
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in calls]:
        raise DataError(f"calibration: layer {missing[0]!r} was never reached; exclude it")

    def held(chain: _Chain) -> int:
        return sum(_group(name) in chain.blocks for name in layers)

    whole = [c for c in chains if c.unbroken and not c.ahead and 2 * held(c) > len(layers)]
    if not whole or max(calls.values()) > 1:  # a layer shared between blocks needs the whole model
        return list(calls), {}
    return list(calls), dict(max(whole, key=held).blocks)


def _observe(
    layers: Mapping[str, nn.Linear],
    statistic: type[Statistic],
    run: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    inputs_only: bool = False,
) -> dict[str, Any]:
    """Run something on all batches and sum a statistic over the inputs of some layers.

    With ``inputs_only``, which needs layers that are called once a batch, a run ends as soon as it has reached
    them all: in a ViT's block, a third of the work lies behind the input of its last layer.
    """
    found = {name: statistic(layer.in_features, layer.weight.device) for name, layer in layers.items()}
    ahead: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                found[name].update(args[0].detach().float().reshape(-1, args[0].shape[-1]))
            ahead.discard(name)
            if inputs_only and not ahead:
                raise _ReachedError

        return take

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            ahead.update(layers)
            with suppress(_ReachedError):
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if world_size() > 1:
        for one in found.values():
            one.combine()
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
