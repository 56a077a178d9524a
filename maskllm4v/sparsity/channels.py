"""Channels between two layers of a block, and all tensors that have a value per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maskllm4v.utils.errors import ConfigError

Outputs = Literal["each", "pairs", "last"]
"""Which outputs of a layer are channels, where there are several times as many. ``each``: one part after the other, all
in the same order, such as gate and value. ``pairs``: so many side by side belong to a channel. ``last``: the last part,
such as the values behind queries and keys.
"""


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor that holds channels.

    Attributes:
        tensor: a parameter or buffer.
        view: its part with the channels, which lie along the last dimension; shares memory with it.
    """

    tensor: Tensor
    view: Tensor


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels that one matrix reads.

    Attributes:
        count: how many there are.
        parts: they move within so many equal parts, the heads; 1: freely.
        places: all tensors that hold them.
        experts: so many sets of channels, each with an order of its own, along the first dimension of all places; None:
            one set.
    """

    count: int
    parts: int
    places: tuple[Place, ...]
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an order: ``[in]``, or ``[experts, in]``."""
        return (self.count,) if self.experts is None else (self.experts, self.count)

    def check(self, order: Tensor, layer: str) -> None:
        """Raise :class:`ConfigError`, naming the layer that reads them, unless they may be put into that order."""
        places, size = torch.arange(self.count).expand(self.shape), self.count // self.parts
        if order.shape != places.shape or order.is_floating_point() or not order.sort().values.equal(places.to(order)):
            of = "" if self.experts is None else f"each of its {self.experts} experts' "
            raise ConfigError(f"layer {layer!r}: not a permutation of {of or 'its '}{self.count} input channels")
        if not (order // size).equal((places // size).to(order)):
            raise ConfigError(f"layer {layer!r}: a permutation that moves channels between its {self.parts} heads")

    @torch.no_grad()
    def permute_(self, order: Tensor) -> None:
        """Put channel ``order[i]`` in place i; of expert e, ``order[e, i]``."""
        for place in self.places:
            index = order.to(place.view.device, torch.long)
            if self.experts is None:
                place.view.copy_(place.view.index_select(-1, index))
            else:
                for view, own in zip(place.view, index, strict=True):
                    view.copy_(view.index_select(-1, own))


def place(tensor: Tensor, dim: int, count: int, outputs: Outputs = "each") -> Place:
    """Where a tensor holds ``count`` channels along a dimension whose size they divide."""
    whole = tensor.detach()
    if outputs == "last":
        view = whole.narrow(dim, whole.shape[dim] - count, count).movedim(dim, -1)
    elif outputs == "pairs":
        view = whole.unflatten(dim, (count, -1)).movedim(dim, -1)
    else:
        view = whole.unflatten(dim, (-1, count)).movedim(dim + 1, -1)
    return Place(tensor, view)
