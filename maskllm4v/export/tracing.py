"""Models of transformers as ``torch.export`` can trace them: what they look up in tensors is constant beforehand."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from maskllm4v.utils.errors import ConfigError

MASKED = "attn_mask_probs"  # EoMT's, of its last blocks (Kerssies et al. 2025, mask annealing)
CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # of shapes; ONNX has no operation for them


def make_constant_(module: nn.Module) -> None:
    """Replace tensors that decide which operations run by their numbers, in place; the module is only for tracing.

    EoMT looks into ``attn_mask_probs`` whether a block masks its attention: 1, it does; 0, it does not.

    Raises:
        ConfigError: a number lies between, and the model draws at random which queries are masked.
    """
    for name, inner in module.named_modules():
        if (found := inner._buffers.get(MASKED)) is None:
            continue
        numbers = tuple(found.tolist())
        if any(0 < number < 1 for number in numbers):
            raise ConfigError(
                f"{f'{name}.{MASKED}'.lstrip('.')} is {list(numbers)}: between 0 and 1 the model masks at random, and "
                "no graph can; train it to the end of its mask annealing"
            )
        del inner._buffers[MASKED]
        setattr(inner, MASKED, numbers)


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Inside, transformers' code finds a tensor's length to be a symbol, as its shape is, and checks nothing.

    ``len`` of a tensor is a number in Python, so RT-DETR's and D-FINE's graphs would take the traced batch size alone.
    """
    classes = {cls for inner in module.modules() for cls in type(inner).__mro__}
    files = {cls.__module__ for cls in classes if cls.__module__.startswith("transformers.models.")}
    hidden: list[Any] = [sys.modules[name] for name in sorted(files) if not hasattr(sys.modules[name], "len")]
    checks = os.environ.get(CHECKS)
    try:
        for file in hidden:
            file.len = _length
        os.environ[CHECKS] = "1"
        yield
    finally:
        for file in hidden:
            del file.len
        del os.environ[CHECKS]
        if checks is not None:
            os.environ[CHECKS] = checks


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) else builtins.len(value)
