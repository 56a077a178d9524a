"""Statistics of one layer's inputs after the other, in a network that changes meanwhile and in its dense twin.

:func:`maskllm4v.oneshot.activations.sequential.stream_statistics` shows all layers of a block at once, as they are
before any of them changes. Here each layer is seen behind all that come before it, those of its own block included, and
both networks run on the same batches, block by block, so that no more than the inputs of two blocks are kept of each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.blocks import find_sequential_blocks, step
from maskllm4v.oneshot.activations.hooks import (
    InputCapture,
    Shown,
    calls_of,
    combined,
    evaluating,
    new_statistics,
    observe,
)
from maskllm4v.oneshot.activations.statistics import CrossCovariance, Hessian, checked
from maskllm4v.sparsity.calibration import Calibration, Tokens, names_by_part
from maskllm4v.sparsity.parameters import Matrix, find_matrix
from maskllm4v.utils.errors import DataError


@torch.no_grad()
def layer_statistics(
    model: nn.Module, layers: Mapping[str, Matrix], parts: Sequence[Calibration], *, dense: nn.Module | None = None
) -> Generator[dict[str, Any], None, None]:
    """Yield a layer's :class:`Hessian` after the other, in the order of execution; of independent parts all at once.

    Whoever iterates may change or replace a layer in the model before asking for the next one.

    Args:
        model: put into evaluation mode for the time being.
        layers: the linear layers of interest, by module name.
        parts: come in their order; see :class:`~maskllm4v.sparsity.calibration.Calibration`.
        dense: a model of the same architecture, which stays as it is. With it, each layer of a part that is
            ``paired`` has :class:`CrossCovariance`.

    Raises:
        ConfigError: a layer that no part names.
        DataError: a part with layers has no batch, its ``forward`` never reaches one of them, or sums over its inputs
            are not finite.
    """
    for part, names in zip(parts, names_by_part(layers, parts), strict=True):
        own = {name: layers[name] for name in names}
        if not own:
            continue
        other = dense if part.paired else None
        with evaluating(model), evaluating(model if other is None else other):
            yield from (_at_once if part.independent else _stream)(model, own, part, other)


def _at_once(
    model: nn.Module, layers: Mapping[str, Matrix], part: Calibration, dense: nn.Module | None
) -> Iterator[dict[str, Any]]:
    run, same = partial(part.forward, model), ((batch, batch) for batch in part.batches)
    if dense is None:
        yield checked(observe(layers, Hessian, run, same, tokens=part.tokens))
        return
    runs, pairs = (run, partial(part.forward, dense)), ((shown, shown) for shown in same)
    yield checked(_observe_both(layers, _twins(layers, dense), runs, pairs, tokens=part.tokens))


def _stream(
    model: nn.Module, layers: Mapping[str, Matrix], part: Calibration, dense: nn.Module | None
) -> Iterator[dict[str, Any]]:
    batches = list(part.batches)
    if not batches:
        raise DataError("calibration: no batches given")
    first, *others = (partial(part.forward, model, batch) for batch in batches)
    units, chain = find_sequential_blocks(model, layers, first, others)
    names = {module: name for name, module in model.named_modules()}
    blocks = [names[block] for block in chain]
    network = _Network(model, blocks, part, batches)
    other = None if dense is None else _Network(dense, blocks, part, batches)
    for unit in units:
        block = None if unit.block is None else names[unit.block]
        for name, layer in unit.layers.items():
            (run, shown), one = network.at(block), {name: layer}
            how: dict[str, Any] = {"tokens": part.tokens, "inputs_only": block is not None}
            if dense is None or other is None:
                yield checked(observe(one, Hessian, run, shown, **how))
                continue
            run_other, shown_other = other.at(block)
            pairs = zip(shown, shown_other, strict=True)
            yield checked(_observe_both(one, _twins(one, dense), (run, run_other), pairs, **how))


class _Network:
    """One of the two, and how far the batches have come along its chain of blocks, given by their names."""

    def __init__(self, model: nn.Module, chain: Sequence[str], part: Calibration, batches: list[Any]) -> None:
        self._model, self._part, self._batches = model, part, batches
        self._ahead = list(chain)
        self._calls: list[Shown] | None = None  # of the block next ahead, a batch each

    def at(self, block: str | None) -> tuple[Callable[[Any], Any], list[Shown]]:
        """What to run, and on what, for the inputs of a block's layers; None: of layers outside the chain.

        Blocks before it are run as they are now.
        """
        if block is None:
            return partial(self._part.forward, self._model), [(batch, batch) for batch in self._batches]
        ahead = self._model.get_submodule(self._ahead[0])
        if self._calls is None:
            self._calls = calls_of(ahead, self._model, self._batches, self._part.forward)
        while self._ahead[0] != block:
            self._calls = [(step(ahead, call), batch) for call, batch in self._calls]
            self._ahead.pop(0)
            ahead = self._model.get_submodule(self._ahead[0])
        return partial(step, ahead), self._calls


def _twins(layers: Mapping[str, Matrix], dense: nn.Module) -> dict[str, Matrix]:
    return {name: find_matrix(dense, name) for name in layers}


def _observe_both(
    layers: Mapping[str, Matrix],
    twins: Mapping[str, Matrix],
    runs: tuple[Callable[[Any], Any], Callable[[Any], Any]],
    pairs: Iterable[tuple[Shown, Shown]],
    *,
    tokens: Tokens | None = None,
    inputs_only: bool = False,
) -> dict[str, Any]:
    """Like :func:`~maskllm4v.oneshot.activations.hooks.observe`, of two networks at once; holds one batch's inputs."""
    found = {name: new_statistics(matrix, CrossCovariance) for name, matrix in layers.items()}
    rows: dict[tuple[str, int], list[Tensor]] = {(n, block): [] for n, of in found.items() for block in range(len(of))}
    of_twin: dict[tuple[str, int], list[Tensor]] = {key: [] for key in rows}

    def hold(into: dict[tuple[str, int], list[Tensor]], name: str, block: int, seen: Tensor) -> None:
        into[name, block].append(seen if inputs_only else seen.clone())  # what runs on may change it in place

    how: dict[str, Any] = {"tokens": tokens, "inputs_only": inputs_only}
    with (
        InputCapture(layers, partial(hold, rows), **how) as watch,
        InputCapture(twins, partial(hold, of_twin), **how) as watch_twin,
    ):
        for shown, shown_to_twin in pairs:
            watch.run(runs[0], *shown)
            watch_twin.run(runs[1], *shown_to_twin)
            for (name, block), seen in rows.items():
                twins_seen = of_twin[name, block]
                if [len(part) for part in seen] != [len(part) for part in twins_seen]:
                    raise DataError(
                        f"layer {name!r} sees other tokens in the dense network; the target has to be symmetric, or "
                        "its calibration a part with paired=False"
                    )
                for part, twin in zip(seen, twins_seen, strict=True):
                    found[name][block].update(part, twin)
                seen.clear()
                twins_seen.clear()
    return {name: combined(statistics) for name, statistics in found.items()}
