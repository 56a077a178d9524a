"""Detectors that take their queries from the encoder's surest tokens: which tokens, and which queries have the same one.

Pruning moves a few queries to other tokens, and others to other places among the queries, so that the i-th query of a
pruned model and the i-th one of the dense model need not have to do with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SelectedTokens(TorchFunctionMode):
    """Inside, keeps the tokens that a model selects by ``torch.topk`` among those of each image.

    transformers' outputs do not name them for every class; its models select in no other way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.topk and result.indices.ndim == 2:
            self._found.append(result.indices)
        return result

    @property
    def tokens(self) -> Tensor:
        """Their places in the encoder's sequence in the order of queries, int64 ``[B, G, Q]``, by group of queries."""
        return torch.stack(self._found, 1)


class Pairs(NamedTuple):
    """Queries of two networks that come from the same tokens of the same images, M in all.

    Attributes:
        image, query, other: where they are, int64 ``[M]`` each; ``query`` is the first network's.
    """

    image: Tensor
    query: Tensor
    other: Tensor


def paired(tokens: Tensor, others: Tensor) -> Pairs:
    """The queries of both whose tokens ``[B, Q]`` are the same; within a network, no two queries of an image share one."""
    return Pairs(*(tokens[:, :, None] == others[:, None]).nonzero(as_tuple=True))
