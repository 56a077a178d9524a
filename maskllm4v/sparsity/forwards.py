"""The beginning and the end of a masked model's forward, which its masks have to know.

Within one forward all readers of a weight see one draw, and after it the noise moves on, where nobody sets it. A single
reader cannot tell where a forward ends; the model that masks were put into can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from maskllm4v.sparsity.masks import Mask


class ForwardHooks:
    """Tells masks of forwards; hangs on a model as two of its hooks."""

    def __init__(self) -> None:
        self.masks: list[Mask] = []

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            for mask in self.masks:
                mask.begin_forward()

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() or any(getattr(mask, "auto_advance", False) for mask in self.masks):
            self._end()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self) -> None:
        for mask in self.masks:
            mask.end_forward()


def watch_forwards_(model: nn.Module) -> None:
    """Tell a model's masks of its forwards from now on, and no longer of those of its parts alone.

    A model without masks loses its hooks.
    """
    masks = list(dict.fromkeys(module for module in model.modules() if isinstance(module, Mask)))
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                if isinstance(getattr(hook, "__self__", None), ForwardHooks):
                    del table[key]
    if masks:
        hooks = ForwardHooks()
        hooks.masks = masks
        model.register_forward_pre_hook(hooks.begin)
        model.register_forward_hook(hooks.end)
