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
from maskllm4v.sparsity.masks import LearnableMaskedLinear

CPU_GROUPS = 32_768  # in a call: more leave the cache, as in gumbel.eager
CUDA_GROUPS = 2**17  # one layer of ViT-B is more: what a launch costs counts below


class JoinedDraw:
    """Draws the masks of its layers when the first of them is reached, and hands each its masked weight.

    Args:
        layers: of one pattern, gate, backend, dtype and device; soft or hard alike. They draw through this object from
            now on, until :meth:`part`, and need one τ and one s.

    Attributes:
        energy: Σ(masked weight)² over all its layers in the last draw; their own ``kept_energy`` is not set.
    """

    def __init__(self, layers: Iterable[LearnableMaskedLinear]) -> None:
        self.layers = list(layers)
        self.energy: Tensor | None = None
        self._pieces: dict[LearnableMaskedLinear, Tensor] = {}
        self._modes: tuple[object, ...] = ()
        self._states: dict[LearnableMaskedLinear, tuple[object, ...]] = {}
        for layer in self.layers:
            layer.joined, layer.kept_energy = self, None

    def take(self, layer: LearnableMaskedLinear, dtype: torch.dtype) -> Tensor | None:
        """A layer's masked weight ``[out, in]``, once for each draw; None if the layer is to draw alone.

        So it does, the same mask, if it runs twice in a forward, and where activations are computed again in backward,
        which has to repeat forward's operations.
        """
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # by checkpoint, in forward
        if hooked or torch._C._current_graph_task_id() != -1:
            return None
        modes = (dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if modes != self._modes or any(a is not b for a, b in zip(_state(layer), self._states[layer], strict=True)):
            self._modes, self._states = modes, {other: _state(other) for other in self.layers}
            self._pieces = self._drawn(dtype)
        return self._pieces.pop(layer, None)

    def part(self) -> None:
        """Let layers draw alone again; nothing of a graph is held any more."""
        for layer in self.layers:
            if layer.joined is self:
                layer.joined = None
        self.energy, self._pieces, self._modes, self._states = None, {}, (), {}

    def _drawn(self, dtype: torch.dtype) -> dict[LearnableMaskedLinear, Tensor]:
        first, m = self.layers[0], self.layers[0].pattern.m
        if len({(float(layer._tau.numpy()), float(layer._scaling.numpy())) for layer in self.layers}) > 1:
            raise ValueError("layers that are drawn together have one tau and one scaling")
        sizes = [layer.logits.shape[1] for layer in self.layers]
        masked, self.energy = masked_weight(
            torch.cat([layer.weight.reshape(-1, m) for layer in self.layers]),
            torch.cat([layer.logits for layer in self.layers], 1),
            first.candidates,
            tau=first._tau,
            scaling=first._scaling,
            hard=first.hard,
            key=torch.stack([layer._key for layer in self.layers]),
            sizes=sizes,
            kept=first.gate.kept,
            dtype=dtype,
            backend=first.backend,
        )
        pieces = masked.split(sizes)
        return {layer: piece.view_as(layer.weight) for layer, piece in zip(self.layers, pieces, strict=True)}


def _state(layer: LearnableMaskedLinear) -> tuple[object, ...]:
    """What a draw depends on besides logits; replaced, never changed in place, when it moves."""
    return layer._draw, layer._tau, layer._scaling


def join_layers(layers: Iterable[LearnableMaskedLinear]) -> list[JoinedDraw]:
    """Join layers that can be drawn together, up to :data:`CPU_GROUPS` or :data:`CUDA_GROUPS` groups in a call.

    Larger ones, those without an equal, and those of the backend ``"compiled"``, whose calls are few, stay alone.
    """
    alike: dict[tuple[object, ...], list[list[LearnableMaskedLinear]]] = {}
    for layer in layers:
        groups, most = layer.logits.shape[1], CUDA_GROUPS if layer.weight.is_cuda else CPU_GROUPS
        if groups > most or layer.backend == "compiled":
            continue
        weight = layer.weight
        kind = (
            layer.pattern,
            type(layer.gate),
            layer.hard,
            layer.backend,
            weight.dtype,
            layer.logits.dtype,
            weight.device,
        )
        calls = alike.setdefault(kind, [])
        fitting = (call for call in calls if sum(other.logits.shape[1] for other in call) + groups <= most)
        call = next(fitting, None)
        if call is None:
            calls.append([layer])
        else:
            call.append(layer)
    return [JoinedDraw(call) for calls in alike.values() for call in calls if len(call) > 1]
