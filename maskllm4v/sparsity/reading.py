"""When a masked weight that was computed for one reader may be given to the next.

Computing it costs a draw in training, and in evaluation several times the product of a small layer. But what was
computed before may be wrong by now, and that without a sign: fused optimisers and writes through ``.data`` raise no
tensor's version. So a weight in training is shared within one forward of the model alone, with gradients on; in
evaluation it is kept as long as its parameter is frozen and nobody changes the mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from maskllm4v.sparsity.masks import Mask


def product_dtype(weight: Tensor) -> torch.dtype:
    """What a matrix product will read the weight as: under autocast it is written so at once."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def in_backward() -> bool:
    """Whether autograd runs backward, where activation checkpointing computes again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recomputed() -> bool:
    """Whether what is computed now will be, or is being, computed again: it has to repeat every operation then."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # by checkpoint, in forward
    return hooked or torch._C._current_graph_task_id() != -1


def traced() -> bool:
    """Whether operations are recorded or stand for others: what is read now is for the recording alone."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_tracing()
    )


class LastRead:
    """The masked weight that was handed out last."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._version = 0
        self._state: tuple[object, ...] | None = None  # None: it serves nobody else

    def of(self, mask: Mask, weight: Tensor) -> Tensor:
        """The masked weight, computed if the last one does not do."""
        self._check(mask.name)
        state = _state(mask, weight)
        if state is not None and state == self._state and self._value is not None:
            return self._value
        value = mask.masked(weight)
        self._value, self._state = value, state
        self._version = 0 if value.is_inference() else value._version
        return value

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of what was handed out last."""
        value = self._value
        return value is not None and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def forget(self, name: str) -> None:
        self._check(name)
        self._value = self._state = None

    def end(self, name: str) -> None:
        """Forget all that belongs to one forward: what is kept are weights of evaluation, which are frozen."""
        if self._state is None or self._state[0]:
            self.forget(name)

    def _check(self, name: str) -> None:
        value = self._value
        if value is not None and not value.is_inference() and value._version != self._version:
            self._value = self._state = None
            raise RuntimeError(
                f"the weight of {name!r} was written to as it is read: that is its masked copy, so the parameter is "
                "as before; write to maskllm4v.dense_weight(layer)"
            )


def _state(mask: Mask, weight: Tensor) -> tuple[object, ...] | None:
    """All that a masked weight depends on; None if it must not be used again. The training mode comes first."""
    grad = torch.is_grad_enabled()
    if weight.is_inference():  # such tensors count no changes
        return None
    if mask.training:
        if not (mask.sharing and grad) or recomputed():
            return None
    elif weight.requires_grad:
        return None
    modes = mask.training, grad, torch.is_inference_mode_enabled(), product_dtype(weight)
    return *modes, id(weight), weight.data_ptr(), weight._version, *mask.state()
