"""When a masked weight that was computed for one reader may be given to the next.

Computing it costs a draw in training, and in evaluation several times the product of a small layer. But what was
computed before may be wrong by now, and that without a sign: fused optimisers and writes through ``.data`` raise no
tensor's version. So a weight in training is shared within one forward of the model alone, with gradients on; in
evaluation it is kept as long as its parameter is frozen and nobody changes the mode.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class _Read:
    """A masked weight that was handed out.

    Attributes:
        value: the masked weight.
        version: of the value, by which writes to it are noticed.
        sources: what it was computed from. Weakly: a place in memory, and an object's ``id``, are soon another's, as
            with the tensors of one functional call after the other.
        state: what else it depends on; None: it serves nobody else.
    """

    value: Tensor
    version: int
    sources: tuple[weakref.ref[Tensor], ...]
    state: tuple[object, ...] | None

    def is_of(self, sources: tuple[Tensor, ...], state: tuple[object, ...] | None) -> bool:
        if state is None or state != self.state:
            return False
        return all(kept() is source for kept, source in zip(self.sources, sources, strict=True))


class LastRead:
    """The masked weight that was handed out last.

    Attributes:
        sharing: inside a forward of the model, see :mod:`maskllm4v.sparsity.forwards`.
    """

    def __init__(self) -> None:
        self.sharing = False
        self._read: _Read | None = None  # replaced as a whole: threads may read at once

    def of(self, mask: Mask, weight: Tensor) -> Tensor:
        """The masked weight, computed if the last one does not do."""
        self._check(mask.name)
        last, sources = self._read, mask.sources(weight)
        state = self._state(mask, weight, sources)
        if last is not None and last.is_of(sources, state):
            return last.value
        value = mask.masked(weight)
        version = 0 if value.is_inference() else value._version
        self._read = _Read(value, version, tuple(map(weakref.ref, sources)), state)
        return value

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of what was handed out last."""
        last = self._read
        return last is not None and last.value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def forget(self, name: str) -> None:
        self._check(name)
        self._read = None

    def end(self, name: str) -> None:
        """A forward is over: forget all that belongs to it. What stays are weights of evaluation, which are frozen."""
        self.sharing = False
        if self._read is None or self._read.state is None or self._read.state[0]:
            self.forget(name)

    def _state(self, mask: Mask, weight: Tensor, sources: tuple[Tensor, ...]) -> tuple[object, ...] | None:
        """All that a masked weight depends on but its sources themselves; None if it must not be used again.

        The training mode comes first.
        """
        grad = torch.is_grad_enabled()
        if any(source.is_inference() for source in sources):  # such tensors count no changes
            return None
        if mask.training:
            if not (self.sharing and grad) or recomputed():
                return None
        elif weight.requires_grad:
            return None
        modes = mask.training, grad, torch.is_inference_mode_enabled(), product_dtype(weight)
        contents = [(source.data_ptr(), source._version) for source in sources]
        return *modes, *contents, *mask.state()

    def _check(self, name: str) -> None:
        last = self._read
        if last is not None and not last.value.is_inference() and last.value._version != last.version:
            self._read = None
            raise RuntimeError(
                f"the weight of {name!r} was written to as it is read: that is its masked copy, so the parameter is "
                "as before; write to maskllm4v.dense_weight(layer)"
            )
