"""Ctrl-C wherever one likes, and all that it may not have changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

import maskllm4v
from maskllm4v.sparsity import rollback

PACKAGE = maskllm4v.__path__[0]


def whole(model: nn.Module) -> dict[str, Any]:
    """What a model is, to the last bit: tensors, which objects they are, classes, modes, gradients, hooks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "values": {name: bits(tensor) for name, tensor in model.state_dict().items()},
        "tensors": [(name, id(one), one.requires_grad) for name, one in model.named_parameters(remove_duplicate=False)],
        "buffers": [(name, id(one)) for name, one in model.named_buffers(remove_duplicate=False)],
        "modules": [(name, id(one), type(one), one.training) for name, one in modules.items()],
        "hooks": {(name, table): hooks(one, table) for name, one in modules.items() for table in tables(one)},
    }


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def tables(module: nn.Module) -> list[str]:
    return [name for name in module.__dict__ if "_hooks" in name]


def hooks(module: nn.Module, table: str) -> list[tuple[int, int]]:
    return [(key, id(getattr(hook, "__self__", hook))) for key, hook in module.__dict__[table].items()]


def lines(run: Callable[[], object], stop_at: int | None = None) -> int:
    """Run something and count the package's lines; Ctrl-C before the one of a number, if any.

    Lines of :mod:`maskllm4v.sparsity.rollback` do not count: who interrupts the repair gets what he asked for.
    """
    count = 0

    def called(frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        return line if name.startswith(PACKAGE) and name != rollback.__file__ else None

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt
        return line

    before = sys.gettrace()
    sys.settrace(called)
    try:
        run()
    finally:
        sys.settrace(before)
    return count
