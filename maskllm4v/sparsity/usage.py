"""Whether masks have an effect: somebody has to read the weight under each, and gradients have to come back through it.

A mask whose weight nobody reads changes nothing, and nothing else says so: its layer may be dense by way of a copy, or
not run at all. Gradients alone do not tell: a regulariser gives them to logits of weights that nobody multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.learnable import LearnableMask
from maskllm4v.sparsity.masks import Mask
from maskllm4v.sparsity.parameters import masked_parameters
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.text import few


class Usage:
    """Watches a model's masks from now on, until :meth:`close`.

    Reads in compiled code cannot be seen: where a model has compiled parts, none of its masks counts as unread, and
    any gradient of the logits will do.

    Args:
        model: masked, or not.
        compiled: whether it runs inside something compiled.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        self.masks = {name: parameter.mask for name, parameter in masked_parameters(model).items()}
        self._compiled = compiled or has_compiled_parts(model)
        self._read: set[Mask] = set()
        self._reached: set[Mask] = set()
        for mask in self.masks.values():
            mask.on_read = self._see

    def close(self) -> None:
        for mask in self.masks.values():
            mask.on_read = None

    @property
    def any_gradient(self) -> bool:
        """Whether any came back."""
        return bool(self._reached)

    def unread(self) -> list[str]:
        """The parameters that nobody has read under their masks."""
        return [] if self._compiled else [name for name, mask in self.masks.items() if mask not in self._read]

    def without_gradient(self) -> list[str]:
        """The parameters with logits whose masked weight got no gradient."""
        return [
            name
            for name, mask in self.masks.items()
            if isinstance(mask, LearnableMask)
            and mask not in self._reached
            and (mask in self._read or mask.logits.grad is None)
        ]

    def _see(self, mask: Mask, value: Tensor) -> None:
        self._read.add(mask)
        if value.requires_grad and torch.is_grad_enabled() and isinstance(mask, LearnableMask):
            value.register_hook(lambda gradient: self._reached.add(mask) if gradient is not None else None)


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether a model or a module of it was given to ``torch.compile``, or its ``forward`` was."""

    def compiled(module: nn.Module) -> bool:
        if getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules:
            return True
        return hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")

    return any(compiled(module) for module in model.modules())


@contextmanager
def each_mask_used(model: nn.Module) -> Iterator[None]:
    """For training loops of your own: run the first batch inside, forward, or forward and backward.

    :func:`maskllm4v.learn_masks` looks by itself::

        with maskllm4v.each_mask_used(model):
            loss(model(images), labels).backward()

    Raises:
        ConfigError: at the end, if nobody has read the weight of a mask, or if some logits have got a gradient and
            others none; names the parameters.
    """
    usage = Usage(model)
    try:
        yield
    finally:
        usage.close()
    if unread := usage.unread():
        raise ConfigError(no_effect(unread))
    if usage.any_gradient and (idle := usage.without_gradient()):
        raise ConfigError(not_learned(idle))


def no_effect(names: list[str]) -> str:
    """What is wrong with masks that nobody reads."""
    return (
        f"{few(names, 'layer')}: nothing read the masked weight in the first batch, so that the mask has no effect; "
        "leave such layers dense with `exclude`"
    )


def not_learned(names: list[str]) -> str:
    """What is wrong with logits that the loss does not depend on."""
    return (
        f"{few(names, 'layer')}: the loss of the first batch gives no gradient to the mask's logits, which learn "
        "nothing; leave such layers dense with `exclude`"
    )
