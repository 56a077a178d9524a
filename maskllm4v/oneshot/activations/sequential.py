"""Statistics of layer inputs for one-shot pruning, streamed block by block through any model.

Where a model is a chain of blocks (each block's output is the next one's input, as in ViT) only one
block's activations are kept. Any other model (Swin, ConvNeXt, hierarchical ones) is run as a whole with
hooks on the layers at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskllm4v.chains import Call, find_units, step
from maskllm4v.errors import ConfigError, DataError
from maskllm4v.statistics import Statistic
from maskllm4v.watching import calls_of, evaluating, observe

Forward = Callable[[nn.Module, Any], Any]
Propagate = Literal["dense", "pruned"]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(x)`` for a tensor, ``model(batch[0])`` for an (inputs, labels) pair, ``model(**batch)`` for a dict."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


@dataclass(frozen=True)
class Calibration:
    """Batches that show layers their inputs, and the layers that see them.

    Several of them are the parts of one calibration. A layer belongs to the first part that names it; its inputs may
    depend on the layers of its own part and of parts before that, never on those of later ones.

    Attributes:
        batches: iterated over once at most.
        forward: how to run the model on a batch; it may run a piece of it.
        layers: name patterns as in shells.
        independent: no layer's input depends on another layer's output, so that one pass shows all of them.
    """

    batches: Iterable[Any]
    forward: Forward = default_forward
    layers: tuple[str, ...] = ("*",)
    independent: bool = False


def as_parts(calibration: Iterable[Any] | Tensor | Calibration, forward: Forward | None) -> Sequence[Calibration]:
    """The parts of a calibration that may also be an input tensor or batches, which ``forward`` runs.

    Raises:
        ConfigError: parts among batches, or a ``forward`` beside parts, which have their own.
    """
    if isinstance(calibration, Calibration):
        calibration = [calibration]
    if isinstance(calibration, list | tuple) and any(isinstance(part, Calibration) for part in calibration):
        if not all(isinstance(part, Calibration) for part in calibration):
            raise ConfigError("calibration holds both parts and batches; wrap the batches in a Calibration")
        if forward is not None:
            raise ConfigError("forward is given, but each part of the calibration has its own")
        return calibration
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    return [Calibration(batches, forward or default_forward)]


def names_by_part(names: Iterable[str], parts: Sequence[Calibration]) -> list[list[str]]:
    """Which layers belong to each part, in the order given.

    Raises:
        ConfigError: a layer that no part names.
        DataError: no parts.
    """
    if not parts:
        raise DataError("calibration: no batches given")
    found: list[list[str]] = [[] for _ in parts]
    for name in names:
        for part, own in zip(parts, found, strict=True):
            if any(fnmatchcase(name, pattern) for pattern in part.layers):
                own.append(name)
                break
        else:
            raise ConfigError(f"calibration: no part names layer {name!r}; exclude it or add it to one")
    return found


@torch.no_grad()
def part_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    parts: Sequence[Calibration],
    statistic: type[Statistic],
    *,
    propagate: Propagate,
) -> Iterator[dict[str, Any]]:
    """Yield the statistics of one unit of layers after the other, part by part; see :func:`stream_statistics`.

    Parts come in their order with ``propagate="pruned"``, so that each sees what those before it have become, and in
    reverse with ``"dense"``, so that each is done before anything that it depends on changes. An independent part is
    one unit. A part without layers of interest is passed over; its batches are not asked for.

    Raises:
        ConfigError: a layer that no part names.
        DataError: a part with layers has no batch, or its ``forward`` never reaches one of them.
    """
    shares = list(zip(parts, names_by_part(layers, parts), strict=True))
    with evaluating(model):
        for part, names in shares if propagate == "pruned" else reversed(shares):
            own = {name: layers[name] for name in names}
            if not own:
                continue
            if part.independent:
                yield observe(own, statistic, partial(part.forward, model), part.batches)
            else:
                yield from stream_statistics(
                    model, own, part.batches, statistic, propagate=propagate, forward=part.forward
                )


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
        statistic: :class:`~maskllm4v.statistics.InputNorm`, :class:`~maskllm4v.statistics.Hessian` or one of your own.
        propagate: see above.
        forward: how to run the model on a batch.

    Raises:
        DataError: no batch, or a layer is never reached.
    """
    batches = list(batches)
    if not batches:
        raise DataError("calibration: no batches given")
    with evaluating(model):
        units, chain = find_units(model, layers, lambda: forward(model, batches[0]))
        blocks = iter(chain)
        seen: dict[str, Any] = {}  # dense statistics of what lies outside the chain, before anything changes
        stream: list[Call] | None = None  # how the chain's next block is called, a batch each
        if propagate == "dense":
            outside = {n: layer for unit in units if unit.block is None for n, layer in unit.layers.items()}
            if outside:
                seen = observe(outside, statistic, lambda batch: forward(model, batch), batches)
            if chain:
                stream = calls_of(chain[0], model, batches, forward)
        last = max((i for i, unit in enumerate(units) if unit.block is not None), default=-1)
        for i, unit in enumerate(units):
            if unit.block is None:
                if propagate == "dense":
                    yield {name: seen[name] for name in unit.layers}
                else:
                    yield observe(unit.layers, statistic, lambda batch: forward(model, batch), batches)
                continue
            if stream is None:
                stream = calls_of(chain[0], model, batches, forward)
            for block in blocks:
                if block is unit.block:
                    break
                stream = [step(block, call) for call in stream]  # a block without layers of interest
            if propagate == "pruned" or i == last:  # nobody needs what comes out of the block as it is
                yield observe(unit.layers, statistic, partial(step, unit.block), stream, inputs_only=True)
                stream = [] if i == last else [step(unit.block, call) for call in stream]
                continue
            outputs: list[Call] = []

            def run(call: Call, block: nn.Module = unit.block, into: list[Call] = outputs) -> None:
                into.append(step(block, call))

            yield observe(unit.layers, statistic, run, stream)
            stream = outputs
