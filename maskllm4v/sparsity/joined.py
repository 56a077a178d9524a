"""Masks of several small layers drawn in one call, where what a call costs outweighs its arithmetic.

A layer of some thousand weights takes microseconds of arithmetic and tens of operations, each with a cost of its own;
on a GPU each is a launch. Layers with the same pattern, logits and mode go side by side along their groups. Each gets
the noise that it would get alone, so masks and gradients are the same: up to rounding, and to the bit on a CPU where
every layer's number of groups is a multiple of 64 (PyTorch sums what is left of 4 vectors in another order).

Joined masked weights live until backward has passed the first layer of a call, not each until its own, so that calls
are bounded; and where gradients are exchanged while backward goes on (several processes) nothing should be joined.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.layers import is_cut_up
from maskllm4v.sparsity.layout import to_rows
from maskllm4v.sparsity.learnable import LearnableMask
from maskllm4v.sparsity.parameters import MaskedParameter
from maskllm4v.sparsity.reading import recomputed

CPU_GROUPS = 32_768  # in a call: more leave the cache, as in gumbel.eager
CUDA_GROUPS = 2**17  # one layer of ViT-B is more: what a launch costs counts below


class JoinedDraw:
    """Draws its masks when the first of their weights is read, and hands each its masked weight.

    Args:
        weights: parameters and their masks, of one pattern, gate, backend, dtype and device; soft or hard alike. The
            masks draw through this object from now on, until :meth:`part`, and need one τ and one s.

    Attributes:
        energy: Σ(masked weight)² over all its weights in the last draw; the masks' own ``kept_energy`` is not set.
    """

    def __init__(self, weights: Iterable[MaskedParameter]) -> None:
        self.weights = list(weights)
        self.masks = [weight.learnable for weight in self.weights]
        self.energy: Tensor | None = None
        self._pieces: dict[LearnableMask, Tensor] = {}
        self._modes: tuple[object, ...] = ()
        self._states: dict[LearnableMask, tuple[object, ...]] = {}
        for mask in self.masks:
            mask.joined, mask.kept_energy = self, None
            mask.forget()

    def take(self, mask: LearnableMask, dtype: torch.dtype) -> Tensor | None:
        """A mask's weight under it, as rows ``[..., out, in]``, once for each draw; None if it is to draw alone.

        So it does, the same mask, if it is read again later, and where activations are computed again in backward,
        which has to repeat forward's operations.
        """
        if recomputed():
            return None
        modes = (dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if modes != self._modes or any(a is not b for a, b in zip(_state(mask), self._states[mask], strict=True)):
            self._modes, self._states = modes, {other: _state(other) for other in self.masks}
            self._pieces = self._drawn(dtype)
        return self._pieces.pop(mask, None)

    def part(self) -> None:
        """Let masks be drawn alone again; nothing of a graph is held any more."""
        for mask in self.masks:
            mask.forget()
            if mask.joined is self:
                mask.joined = None
        self.energy, self._pieces, self._modes, self._states = None, {}, (), {}

    def _drawn(self, dtype: torch.dtype) -> dict[LearnableMask, Tensor]:
        first, m = self.masks[0], self.masks[0].pattern.m
        if len({(float(mask._tau.numpy()), float(mask._scaling.numpy())) for mask in self.masks}) > 1:
            raise ValueError("layers that are drawn together have one tau and one scaling")
        sizes = [mask.logits.shape[1] for mask in self.masks]
        rows = [to_rows(weight.weight, weight.mask.layout) for weight in self.weights]
        masked, self.energy = masked_weight(
            torch.cat([part.reshape(-1, m) for part in rows]),
            torch.cat([mask.logits for mask in self.masks], 1),
            first.candidates,
            tau=first._tau,
            scaling=first._scaling,
            hard=first.hard,
            key=torch.stack([mask._key for mask in self.masks]),
            sizes=sizes,
            kept=first.gate.kept,
            dtype=dtype,
            backend=first.backend,
        )
        pieces = zip(self.masks, masked.split(sizes), strict=True)
        return {mask: piece.view(mask.shape) for mask, piece in pieces}


def _state(mask: LearnableMask) -> tuple[object, ...]:
    """What a draw depends on besides logits; replaced, never changed in place, when it moves."""
    return mask._draw, mask._tau, mask._scaling


def join_draws(weights: Iterable[MaskedParameter]) -> list[JoinedDraw]:
    """Join learnable masks that can be drawn together, up to :data:`CPU_GROUPS` or :data:`CUDA_GROUPS` groups a call.

    Larger ones, those without an equal, those of the backend ``"compiled"``, whose calls are few, and those that FSDP
    has cut up, of which one at a time is whole, stay alone.
    """
    alike: dict[tuple[object, ...], list[list[MaskedParameter]]] = {}
    for one in weights:
        weight, mask = one.weight, one.learnable
        groups, most = mask.logits.shape[1], CUDA_GROUPS if weight.is_cuda else CPU_GROUPS
        if groups > most or mask.backend == "compiled" or is_cut_up(weight):
            continue
        kind = (
            mask.pattern,
            type(mask.gate),
            mask.hard,
            mask.backend,
            weight.dtype,
            mask.logits.dtype,
            weight.device,
        )
        calls = alike.setdefault(kind, [])
        fitting = (call for call in calls if sum(other.learnable.logits.shape[1] for other in call) + groups <= most)
        call = next(fitting, None)
        if call is None:
            calls.append([one])
        else:
            call.append(one)
    return [JoinedDraw(call) for calls in alike.values() for call in calls if len(call) > 1]
