"""Which parameter is multiplied by what while a model runs, seen at the product itself.

Layers need not be called for their weights to be used: BEiT, EVA and Swin hand the weight of ``qkv`` to ``F.linear``
themselves, ``nn.MultiheadAttention`` has a parameter for three matrices. So products are watched, not modules: those of
``torch``'s functions of which an operand lies in the memory of a parameter, whole or a slice of it.
"""

from __future__ import annotations

import types
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
        for product in products:
            self._after(product, output)
        return output

    def _products(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Product]:
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
        if not isinstance(weight, Tensor) or weight.dim() < 2 or type(weight) not in (Tensor, nn.Parameter):
            return
        found = self._found.get(weight.untyped_storage().data_ptr())
        if found is None:  # a weight that has a mask by now
            found = next((self._rows[name] for mask, name in self._masks.items() if mask.is_of(weight)), None)
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
