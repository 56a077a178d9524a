"""Seeing what layers and blocks of a model are called with while it runs, through hooks that go again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.blocks import Call, never_reached
from maskllm4v.oneshot.activations.statistics import Statistic
from maskllm4v.sparsity.calibration import hooks_run
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.processes import world_size


class _ReachedError(Exception):
    """Ends a forward pass as soon as a block's input is known."""


def calls_of(
    block: nn.Module, model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]
) -> list[Call]:
    """The arguments that a block is called with, for each batch."""
    caught: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
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
    layers: Mapping[str, nn.Linear],
    statistic: type[Statistic],
    run: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    inputs_only: bool = False,
) -> dict[str, Any]:
    """Run something on all batches and sum a statistic over the inputs of some layers; see :class:`InputCapture`.

    Raises:
        DataError: no batch, or a layer is never reached.
    """
    found = {name: statistic(layer.in_features, layer.weight.device) for name, layer in layers.items()}
    with InputCapture(layers, lambda name, rows: found[name].update(rows), inputs_only=inputs_only) as watch:
        for batch in batches:
            watch.run(run, batch)
    if world_size() > 1:
        for one in found.values():
            one.combine()
    return found


class InputCapture:
    """Sees the inputs of some layers while something runs, batch after batch.

    With ``inputs_only``, which needs layers that are called once a batch, a run ends as soon as it has reached
    them all: in a ViT's block, a third of the work lies behind the input of its last layer.

    Args:
        layers: by name.
        take: given a layer's name and float32 rows ``[tokens, in]`` each time it is called, outside autocast.
        inputs_only: see above.

    Raises:
        DataError: at the end of the context, if there was no batch or a layer was never reached.
    """

    def __init__(
        self, layers: Mapping[str, nn.Linear], take: Callable[[str, Tensor], None], *, inputs_only: bool = False
    ) -> None:
        self._layers, self._take, self._inputs_only = layers, take, inputs_only
        self._ahead: set[str] = set()  # layers that this batch has not reached
        self._never = dict.fromkeys(layers)
        self._empty = True
        self._handles: list[Any] = []

    def run(self, run: Callable[[Any], Any], batch: Any) -> None:
        self._empty = False
        self._ahead.update(self._layers)
        with hooks_run(), suppress(_ReachedError):
            run(batch)

    def _see(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        with torch.autocast(args[0].device.type, enabled=False):
            self._take(name, args[0].detach().float().reshape(-1, args[0].shape[-1]))
        self._ahead.discard(name)
        self._never.pop(name, None)
        if self._inputs_only and not self._ahead:
            raise _ReachedError

    def __enter__(self) -> InputCapture:
        self._handles = [
            layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
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
