"""Masks as modules: what all have in common, and fixed ones; learned ones are in :mod:`maskllm4v.sparsity.learnable`.

A mask belongs to one parameter, which stays dense and where it is. Whoever reads that parameter as an attribute of its
module gets :meth:`Mask.read` of it (:mod:`maskllm4v.sparsity.layers`). Where a mask is missing that is an error, never
a dense weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.layout import Layout, from_rows, to_rows
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.reading import LastRead, traced
from maskllm4v.utils.errors import CheckpointError, PatternError


class Mask(nn.Module):
    """The mask of one parameter.

    Args:
        weight: the parameter; it is looked at, not kept.
        pattern: N:M.
        name: of the parameter in its model: the layer's, if it is a layer's weight; for messages, and part of the
            noise's key.
        layout: how the parameter holds its rows (:mod:`maskllm4v.sparsity.layout`).

    Attributes:
        shape: of the weight as rows, ``[..., out, in]``: groups lie along the last dimension.
        dense_mode: whether readers get the dense weight; see :func:`maskllm4v.sparsity.surgery.as_dense`.
        on_read: called with the mask and what a reader gets; not in compiled code, nor in ``dense_mode``.
    """

    def __init__(self, weight: Tensor, pattern: NMPattern, name: str, layout: Layout) -> None:
        super().__init__()
        self.shape = to_rows(weight, layout).shape
        pattern.check_fits(self.shape[-1], name or "weight")
        self.pattern, self.name, self.layout = pattern, name, layout
        self.dense_mode = False
        self._last = LastRead()
        self.on_read: Callable[[Mask, Tensor], None] | None = None

    @abstractmethod
    def current_mask(self) -> Tensor:
        """The mask used at inference, boolean ``[..., out, in]``."""

    @abstractmethod
    def masked(self, weight: Tensor) -> Tensor:
        """The parameter under the mask, in the parameter's own layout; in training mode drawn, if it is learned."""

    @abstractmethod
    def sources(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The tensors that :meth:`masked` is computed from; the weight comes first."""

    def state(self) -> tuple[object, ...]:
        """What :meth:`masked` depends on besides its sources and the mode, as values that can be compared."""
        return ()

    def read(self, weight: Tensor) -> Tensor:
        """What a reader of the parameter gets. It is computed once for all readers where that is safe."""
        if self.dense_mode:
            return weight
        if torch.compiler.is_compiling():
            return self.masked(weight)
        try:
            value = self.masked(weight) if traced() else self._last.of(self, weight)
        except AttributeError as error:  # which nn.Module would answer with the dense parameter
            raise RuntimeError(f"the mask of {self.name!r} failed: {error}") from error
        if self.on_read is not None:
            self.on_read(self, value)
        return value

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is what a reader got last, or a slice of it."""
        return self._last.holds(tensor)

    def forget(self) -> None:
        """Compute the masked weight anew when it is read next.

        Raises:
            RuntimeError: what a reader got was written to, which changes no parameter.
        """
        self._last.forget(self.name)

    def train(self, mode: bool = True) -> Mask:
        self.forget()  # versions of tensors do not tell all: fused optimisers and .data leave them as they are
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget()  # parameters may come back to where they were, with other values
        return super()._apply(fn, recurse)

    def begin_forward(self) -> None:
        """The model's forward begins: until it ends, all readers get the same tensor."""
        self._last.sharing = True
        if self.training:
            self.forget()

    def end_forward(self) -> None:
        self._last.end(self.name)

    def fold(self, weight: Tensor) -> Tensor:
        """The dense weight with zeros in the places that are pruned, a new tensor in the parameter's layout."""
        pruned = from_rows(~self.current_mask(), self.layout, weight.shape)
        return weight.detach().masked_fill(pruned, 0)  # a product would leave −0 where the weight is negative

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": LastRead(), "on_read": None}  # a graph may hang on what was read


class FixedMask(Mask):
    """A fixed boolean mask (Mishra et al., arXiv 2104.08378); arguments as of :class:`Mask`.

    A new one is empty: using it raises :class:`PatternError` until :meth:`set_mask` or a state dict fills it. Weights
    may be trained; masked ones get no gradient.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, pattern: NMPattern, name: str = "", layout: Layout = "rows") -> None:
        super().__init__(weight, pattern, name, layout)
        self.register_buffer("mask", None)

    def set_mask(self, mask: Tensor, device: torch.device) -> None:
        """Install a mask ``[..., out, in]`` after checking its shape and every group."""
        name = self.name or "weight"
        if mask.shape != self.shape:
            raise PatternError(f"layer {name!r}: mask {tuple(mask.shape)} for a weight {tuple(self.shape)}")
        self.pattern.validate(mask, name)
        self.mask = mask.to(device, torch.bool)
        self.forget()

    def current_mask(self) -> Tensor:
        if self.mask is None:
            raise PatternError(f"layer {self.name!r} has no mask yet: call set_mask, or load a checkpoint that has one")
        return self.mask

    def masked(self, weight: Tensor) -> Tensor:
        return weight * from_rows(self.current_mask(), self.layout, weight.shape)

    def sources(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight, self.current_mask()

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        mask, name = state.get(f"{prefix}mask"), _owner(prefix)
        if mask is not None:
            if mask.shape != self.shape:
                raise CheckpointError(f"layer {name!r}: mask {tuple(mask.shape)} in the state dict")
            self.pattern.validate(mask, name)
            self.mask = torch.empty_like(mask if self.mask is None else self.mask, dtype=torch.bool)
        super()._load_from_state_dict(state, prefix, *args)
        if mask is None and self.mask is None and f"{prefix}mask" not in args[2]:
            args[2].append(f"{prefix}mask")  # missing_keys: strict loading must not pass over it
        self.forget()


def _owner(prefix: str) -> str:
    """The name of the parameter whose mask has that prefix in a state dict: ``fc1`` of ``fc1.weight_mask.``."""
    return prefix.removesuffix("_mask.").removesuffix(".weight")
