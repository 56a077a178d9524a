"""Seeing what matrices are multiplied by and blocks are called with while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.blocks import never_reached
from maskllm4v.oneshot.activations.statistics import Statistic
from maskllm4v.sparsity.calibration import Tokens, counting_tokens, hooks_run
from maskllm4v.sparsity.parameters import Matrix
from maskllm4v.sparsity.products import Product, ProductMode
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.processes import world_size

Shown = tuple[Any, Any]  # what something is run on: a batch or a block's call; and the batch that it comes from


class _ReachedError(Exception):
    """Ends a forward pass as soon as a block's input is known."""


def calls_of(
    block: nn.Module, model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]
) -> list[Shown]:
    """The arguments that a block is called with, for each batch, and the batch."""
    caught: list[Shown] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(((args, kwargs), batch))
        raise _ReachedError

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            with hooks_run(), suppress(_ReachedError):
                forward(model, batch)
    finally:
        handle.remove()
    return caught


def observe(
    layers: Mapping[str, Matrix],
    statistic: type[Statistic],
    run: Callable[[Any], Any],
    shown: Iterable[Shown],
    *,
    tokens: Tokens | None = None,
    inputs_only: bool = False,
) -> dict[str, Any]:
    """Run something again and again and sum a statistic over the inputs of some matrices; see :class:`InputCapture`.

    Returns:
        The statistic by name; a list of them of a matrix with several blocks.

    Raises:
        DataError: no batch, or a layer is never reached.
    """
    found = {name: new_statistics(matrix, statistic) for name, matrix in layers.items()}

    def take(name: str, block: int, rows: Tensor) -> None:
        found[name][block].update(rows)

    with InputCapture(layers, take, tokens=tokens, inputs_only=inputs_only) as watch:
        for one in shown:
            watch.run(run, *one)
    return {name: combined(statistics) for name, statistics in found.items()}


def new_statistics(matrix: Matrix, statistic: type[Any]) -> list[Any]:
    """One for each block of a matrix."""
    return [statistic(matrix.in_features, matrix.weight.device) for _ in range(matrix.blocks)]


def combined(statistics: list[Any]) -> Any:
    """A matrix's statistic over all processes; a list of them, if it has several blocks."""
    if world_size() > 1:
        for one in statistics:
            one.combine()
    return statistics if len(statistics) > 1 else statistics[0]


class InputCapture:
    """Sees the inputs of some matrices while something runs, batch after batch.

    With ``inputs_only``, which needs matrices that are used once a batch, a run ends as soon as it has reached
    them all: in a ViT's block, a third of the work lies behind the input of its last layer.

    Args:
        layers: by name.
        take: given a matrix's name, a block of it, and float32 rows ``[tokens, in]`` each time that it is multiplied,
            outside autocast.
        tokens: which rows are given, see :class:`~maskllm4v.sparsity.calibration.Calibration`; None: all.
        inputs_only: see above.

    Raises:
        DataError: at the end of the context, if there was no batch or a matrix was never reached.
    """

    def __init__(
        self,
        layers: Mapping[str, Matrix],
        take: Callable[[str, int, Tensor], None],
        *,
        tokens: Tokens | None = None,
        inputs_only: bool = False,
    ) -> None:
        self._layers, self._take, self._tokens, self._inputs_only = layers, take, tokens, inputs_only
        self._all = {(name, block) for name, matrix in layers.items() for block in range(matrix.blocks)}
        self._ahead: set[tuple[str, int]] = set()  # what this batch has not reached
        self._never = dict.fromkeys(layers)
        self._empty = True
        self._batch: Any = None

    def run(self, run: Callable[[Any], Any], argument: Any, batch: Any) -> None:
        self._empty, self._batch = False, batch
        self._ahead.update(self._all)
        with hooks_run(), suppress(_ReachedError), ProductMode(self._layers, before=self._see):
            run(argument)

    def _see(self, product: Product) -> None:
        inputs, name = product.inputs, product.name
        counting = counting_tokens(self._tokens, name, inputs, self._batch)
        with torch.autocast(inputs.device.type, enabled=False):
            rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
            self._take(name, product.block, rows if counting is None else rows[counting.reshape(-1)])
        self._ahead.discard((name, product.block))
        self._never.pop(name, None)
        if self._inputs_only and not self._ahead:
            raise _ReachedError

    def __enter__(self) -> InputCapture:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._empty:
            raise DataError("calibration: no batches given")
        if self._never:
            raise never_reached(self._never)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
