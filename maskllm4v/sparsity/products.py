"""Which parameter is multiplied by what while a model runs, seen at the product itself.

Layers need not be called for their weights to be used: BEiT, EVA and Swin hand the weight of ``qkv`` to ``F.linear``
themselves, ``nn.MultiheadAttention`` has a parameter for three matrices. So products are watched, not modules: those of
``torch``'s functions of which an operand lies in the memory of a parameter, whole or a slice of it, or, of a stack of
experts, was picked from it by a list of their numbers.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskllm4v.sparsity.layers import mask_of
from maskllm4v.sparsity.parameters import Matrix

_LINEAR = {F.linear}
_CONVOLUTION = {F.conv1d, F.conv2d, F.conv3d}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
_ADDMM = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}
_GROUPED = {torch._grouped_mm} if hasattr(torch, "_grouped_mm") else set()  # that of F.grouped_mm
_PICKED = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
_BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_ATTENTION = F.multi_head_attention_forward


@dataclass(frozen=True)
class Product:
    """``inputs @ weightᵀ + bias`` as a model is about to compute it.

    Attributes:
        name: of the matrix.
        block, blocks: which of its equal parts is used, and how many such parts it has; several with a part each are
            reported as so many products.
        inputs: ``[..., in]``; of a convolution its patches ``[B, ..., in]``.
        bias: what is added, if anything.
    """

    name: str
    block: int
    blocks: int
    inputs: Tensor
    bias: Tensor | None = None


class ProductMode(TorchFunctionMode):
    """Inside, ``before`` is called ahead of each product with one of some matrices, and ``after`` with its output."""

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        before: Callable[[Product], None] = lambda product: None,
        after: Callable[[Product, Tensor], None] = lambda product, output: None,
    ) -> None:
        super().__init__()
        self._before, self._after = before, after
        self._rows = {name: (name, matrix.rows.detach(), matrix.blocks) for name, matrix in matrices.items()}
        # A model that cuts its own patches has them in another order: such a layer counts as not reached.
        self._only_convolved = {n for n, m in matrices.items() if m.layout == "patches" and m.in_features > m.shape[1]}
        self._found = {m.weight.untyped_storage().data_ptr(): self._rows[name] for name, m in matrices.items()}
        self._masks = {mask: name for name, matrix in matrices.items() if (mask := mask_of(*matrix.places[0]))}
        self._picked: list[tuple[weakref.ref[Tensor], str, Tensor]] = []  # copies of experts' matrices, and of which

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:  # its products lie within
            with self:
                return _opened_attention()(*args, **kwargs)
        products = list(self._products(func, args, kwargs))
        for product in products:
            self._before(product)
        output = func(*args, **kwargs)
        if func in _PICKED:
            self._pick(func, args, kwargs, output)
        for product in products:
            self._after(product, output)
        return output

    def _products(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Product]:
        if func in _GROUPED:
            yield from self._grouped(*_arguments(args, kwargs, "input", "mat2", "offs"))
            return
        if func in _BATCHED and self._picked:
            yield from self._of_picked(*_arguments(args, kwargs, "input", "mat2"))
        bias: Any = None
        if func in _LINEAR or func in _CONVOLUTION:
            inputs, weight, bias = _arguments(args, kwargs, "input", "weight", "bias")[:3]
        elif func in _MATMUL:
            inputs, weight = _arguments(args, kwargs, "input", "other", "mat2")[:2]
            weight = weight.transpose(-1, -2) if isinstance(weight, Tensor) and weight.dim() > 1 else None
        elif func in _ADDMM:
            bias, inputs, weight = _arguments(args, kwargs, "input", "mat1", "mat2")
            weight = weight.transpose(-1, -2) if isinstance(weight, Tensor) else None
        else:
            return
        found = self._matrix(weight)
        if found is None:
            return
        name, rows, blocks = found
        if func in _CONVOLUTION:
            stride = _arguments(args, kwargs, "input", "weight", "bias", "stride")[3]
            yield Product(name, 0, 1, patches(inputs, weight.shape[2:], stride), bias)
            return
        if name in self._only_convolved:
            return
        for place, part in enumerate(_blocks(weight, rows, blocks)):
            of_part = inputs[place] if weight.dim() == 3 and inputs.dim() == 3 else inputs
            yield Product(name, part, blocks, of_part, bias)

    def _matrix(self, weight: object) -> tuple[str, Tensor, int] | None:
        """The matrix in whose memory an operand lies: its name, rows and number of blocks."""
        if not isinstance(weight, Tensor) or weight.dim() < 2 or type(weight) not in (Tensor, nn.Parameter):
            return None
        found = self._found.get(weight.untyped_storage().data_ptr())
        if found is None:  # a weight that has a mask by now
            found = next((self._rows[name] for mask, name in self._masks.items() if mask.is_of(weight)), None)
        return found

    def _grouped(self, inputs: Tensor, weight: Tensor, ends: Tensor | None) -> Iterator[Product]:
        """Rows ``[tokens, in]`` sorted by expert times ``[experts, in, out]``; expert i's rows end at ``ends[i]``."""
        found = self._matrix(weight)
        if found is None or ends is None or inputs.dim() != 2:
            return
        name, rows, blocks = found
        first = 0
        for expert, end in zip(_blocks(weight.transpose(-1, -2), rows, blocks), ends.tolist(), strict=False):
            if end > first:
                yield Product(name, expert, blocks, inputs[first:end])
            first = end

    def _pick(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], picked: Tensor) -> None:
        """Remember a copy of some experts' matrices, one for each token."""
        if func is Tensor.__getitem__:
            (weight, index), dim = args, 0
        else:
            weight, dim, index = _arguments(args, kwargs, "input", "dim", "index")
        if isinstance(index, Tensor) and index.dtype == torch.long and index.dim() == 1 and dim == 0:
            found = self._matrix(weight)
            if found is not None and found[1].dim() == 3 and len(weight) == found[2]:
                self._picked = [entry for entry in self._picked if entry[0]() is not None]
                self._picked.append((weakref.ref(picked), found[0], index))

    def _of_picked(self, left: object, right: object) -> Iterator[Product]:
        """``[tokens, out, in] @ [tokens, in, 1]`` or ``[tokens, 1, in] @ [tokens, in, out]``, by expert."""
        for copy, name, index in self._picked:
            if (picked := copy()) is not None and (picked is left or picked is right):
                inputs: Any = right.transpose(-1, -2) if picked is left and isinstance(right, Tensor) else left
                for expert in index.unique().tolist():
                    yield Product(name, expert, self._rows[name][2], inputs[index == expert])


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """The first arguments by place or name, None where there is none."""
    return [*args, *[None] * len(names)][: len(args)] + [kwargs.get(name) for name in names[len(args) :]]


def patches(inputs: Tensor, kernel: Sequence[int], stride: Sequence[int] | int | None) -> Tensor:
    """What a convolution without padding multiplies: patches ``[B, positions ..., in]`` of ``[(B,) channels, ...]``.

    Inputs come as :func:`maskllm4v.sparsity.layout.to_rows` has them: position by position.
    """
    sizes = len(kernel)
    steps = [stride or 1] * sizes if stride is None or isinstance(stride, int) else [*stride, *stride][:sizes]
    cut = inputs if inputs.dim() == sizes + 2 else inputs[None]
    for dim, (size, step) in enumerate(zip(kernel, steps, strict=True), 2):
        cut = cut.unfold(dim, size, step)
    return cut.movedim(1, -1).flatten(-sizes - 1)


def _blocks(used: Tensor, rows: Tensor, blocks: int) -> list[int]:
    """Which of the equal parts of a matrix's rows ``[..., out, in]`` an operand ``[..., out, in]`` is made of."""
    if used.shape[-1] != rows.shape[-1] or used.stride()[-2:] != rows.stride()[-2:]:
        return []
    offset = used.storage_offset() - rows.storage_offset()
    if rows.dim() == 3:
        first = offset // rows.stride(0) if rows.stride(0) else 0
        return list(range(first, first + (len(used) if used.dim() == 3 else 1)))
    height = rows.shape[0] // blocks
    first = offset // rows.stride(0)
    return list(range(first // height, -(-(first + used.shape[0]) // height)))


@cache
def _opened_attention() -> Any:
    """``F.multi_head_attention_forward`` without its question whether somebody wants to see it as a whole."""
    opened = {**F.__dict__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(_ATTENTION.__code__, opened, _ATTENTION.__name__, _ATTENTION.__defaults__)
    copy.__kwdefaults__ = _ATTENTION.__kwdefaults__
    return copy
