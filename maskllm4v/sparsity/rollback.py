"""Changes of a model that are made whole or not at all: after an error, or Ctrl-C, it is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OWN = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")  # tables of a module
_MORE = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class Rollback:
    """What a model was, apart from the values of tensors; those that are to be written to are given to :meth:`keep`."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {module: self._seen(module) for module in model.modules()}
        self._trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._values = list[tuple[Tensor, Tensor]]()

    @staticmethod
    def _seen(module: nn.Module) -> tuple[type[nn.Module], bool, dict[str, Any]]:
        tables = {name: dict(module.__dict__[name]) for name in (*_OWN, *_MORE) if name in module.__dict__}
        return type(module), module.training, tables

    def keep(self, tensor: Tensor) -> None:
        """Remember the values of a tensor."""
        self._values.append((tensor, tensor.detach().clone()))

    def undo(self) -> None:
        """Make the model what it was."""
        with torch.no_grad():
            for tensor, value in reversed(self._values):
                tensor.copy_(value)
        for module, (cls, training, tables) in self._modules.items():
            module.__class__, module.training = cls, training
            for name, table in tables.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(table)
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Rollback]:
    """Inside, whatever goes wrong leaves the model as it was: classes, masks, parameters, modes, hooks."""
    rollback = Rollback(model)
    try:
        yield rollback
    except BaseException:
        rollback.undo()
        raise
