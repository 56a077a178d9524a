"""Statistics of layer inputs for one-shot pruning, streamed block by block through any model.

Where a model is a chain of blocks (each block's output is the next one's input, as in ViT) only one
block's activations are kept. Any other model (Swin, ConvNeXt, hierarchical ones) is run as a whole with
hooks on the layers at hand.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from maskllm4v.oneshot.activations.blocks import Call, find_sequential_blocks, step
from maskllm4v.oneshot.activations.hooks import Shown, calls_of, evaluating, observe
from maskllm4v.oneshot.activations.statistics import Statistic, checked
from maskllm4v.sparsity.calibration import Calibration, Forward, Tokens, default_forward, names_by_part
from maskllm4v.sparsity.parameters import Matrix
from maskllm4v.utils.errors import DataError

Propagate = Literal["dense", "pruned"]


@torch.no_grad()
def part_statistics(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    parts: Sequence[Calibration],
    statistic: type[Statistic],
    *,
    propagate: Propagate,
) -> Generator[dict[str, Any], None, None]:
    """Yield the statistics of one unit of layers after the other, part by part; see :func:`stream_statistics`.

    Parts come in their order with ``propagate="pruned"``, so that each sees what those before it have become, and in
    reverse with ``"dense"``, so that each is done before anything that it depends on changes. An independent part is
    one unit. A part without layers of interest is passed over; its batches are not asked for.

    Raises:
        ConfigError: a layer that no part names.
        DataError: a part with layers has no batch, its ``forward`` never reaches one of them, or sums over its inputs
            are not finite: the first layer at fault, in the order of execution, is named.
    """
    shares = list(zip(parts, names_by_part(layers, parts), strict=True))
    with evaluating(model):
        for part, names in shares if propagate == "pruned" else reversed(shares):
            own = {name: layers[name] for name in names}
            if not own:
                continue
            if part.independent:
                same = ((batch, batch) for batch in part.batches)
                yield checked(observe(own, statistic, partial(part.forward, model), same, tokens=part.tokens))
            else:
                yield from stream_statistics(
                    model,
                    own,
                    part.batches,
                    statistic,
                    propagate=propagate,
                    forward=part.forward,
                    tokens=part.tokens,
                )


@torch.no_grad()
def stream_statistics(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    batches: Iterable[Any],
    statistic: type[Statistic],
    *,
    propagate: Propagate,
    forward: Forward = default_forward,
    tokens: Tokens | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the statistics of one unit of layers after the other, in the order of execution.

    Whoever iterates may change the layers of a unit before asking for the next one. With
    ``propagate="pruned"`` later units then see the changed layers' outputs, as in SparseGPT and the Wanda
    paper; with ``"dense"`` all inputs are those of the untouched model.

    Args:
        model: put into evaluation mode for the time being.
        layers: the linear layers of interest, by module name.
        batches: calibration batches; all are kept where they lie.
        statistic: one of :mod:`maskllm4v.oneshot.activations.statistics`, or one of your own.
        propagate: see above.
        forward: how to run the model on a batch.
        tokens: which tokens count, see :class:`~maskllm4v.sparsity.calibration.Calibration`; None: all.

    Raises:
        ConfigError: ``tokens`` gives no mask for a layer's inputs.
        DataError: no batch, a layer is never reached, or sums over its inputs are not finite.
    """
    batches = list(batches)
    if not batches:
        raise DataError("calibration: no batches given")
    with evaluating(model):
        first, *others = (partial(forward, model, batch) for batch in batches)
        units, chain = find_sequential_blocks(model, layers, first, others)
        blocks = iter(chain)
        whole, same = partial(forward, model), [(batch, batch) for batch in batches]
        see = partial(observe, tokens=tokens)
        seen: dict[str, Any] = {}  # dense statistics of what lies outside the chain, before anything changes
        stream: list[Shown] | None = None  # how the chain's next block is called, a batch each
        if propagate == "dense":
            outside = {n: layer for unit in units if unit.block is None for n, layer in unit.layers.items()}
            if outside:
                seen = see(outside, statistic, whole, same)
            if chain:
                stream = calls_of(chain[0], model, batches, forward)
        last = max((i for i, unit in enumerate(units) if unit.block is not None), default=-1)
        for i, unit in enumerate(units):
            if unit.block is None:
                if propagate == "dense":
                    yield checked({name: seen[name] for name in unit.layers})
                else:
                    yield checked(see(unit.layers, statistic, whole, same))
                continue
            if stream is None:
                stream = calls_of(chain[0], model, batches, forward)
            for block in blocks:
                if block is unit.block:
                    break
                stream = [(step(block, call), batch) for call, batch in stream]  # a block without layers of interest
            if propagate == "pruned" or i == last:  # nobody needs what comes out of the block as it is
                yield checked(see(unit.layers, statistic, partial(step, unit.block), stream, inputs_only=True))
                stream = [] if i == last else [(step(unit.block, call), batch) for call, batch in stream]
                continue
            outputs: list[Call] = []

            def run(call: Call, block: nn.Module = unit.block, into: list[Call] = outputs) -> None:
                into.append(step(block, call))

            yield checked(see(unit.layers, statistic, run, stream))
            stream = [(call, batch) for call, (_, batch) in zip(outputs, stream, strict=True)]
