"""Correcting the weights that masks keep for those that they prune, in seconds and whatever the masks come from.

A method sees one layer at a time: its dense weight, its mask and the statistic of its inputs in the network as it
has become so far, masked and updated. No weight is trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.paired import layer_statistics
from maskllm4v.oneshot.activations.sequential import part_statistics
from maskllm4v.oneshot.activations.statistics import Hessian
from maskllm4v.oneshot.weight_update.least_squares import update_least_squares
from maskllm4v.oneshot.weight_update.sparsegpt import update_sparsegpt
from maskllm4v.sparsity.calibration import Calibration, Forward, as_parts, check_materialised
from maskllm4v.sparsity.masks import MaskedLinear, unmasked
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.surgery import Masked, Model, get_linear, masked_layers, replace_
from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.progress import bar

Target = Literal["asymmetric", "symmetric"]


class LayerUpdate(Protocol):
    """How a method updates one layer."""

    def __call__(
        self, weight: Tensor, mask: Tensor, statistic: Any, pattern: NMPattern, *, damping: float, layer: str
    ) -> Tensor:
        """New weights for a dense weight ``[out, in]``, zero where its mask is."""


@dataclass(frozen=True)
class UpdateMethod:
    """A method and what it needs.

    Attributes:
        update_layer: see :class:`LayerUpdate`.
        targets: what a layer's outputs may be fitted to, the default first: those of the dense network on its own
            inputs (asymmetric), or those of the dense weights on the inputs that the layer has come to see.
        damping: the default, as a share of the Hessian's mean diagonal.
        layerwise: whether a layer sees what the layers before it in its block have become, or the dense ones.
    """

    update_layer: LayerUpdate
    targets: tuple[Target, ...]
    damping: float
    layerwise: bool


METHODS: dict[str, UpdateMethod] = {
    "least_squares": UpdateMethod(update_least_squares, ("asymmetric", "symmetric"), damping=0.1, layerwise=True),
    "sparsegpt": UpdateMethod(update_sparsegpt, ("symmetric",), damping=0.01, layerwise=False),  # as its authors do
}


def update_weights_(
    model: Model,
    method: str = "least_squares",
    *,
    calibration: Iterable[Any] | Tensor | Calibration,
    dense: nn.Module | None = None,
    target: Target | None = None,
    damping: float | None = None,
    forward: Forward | None = None,
) -> Model:
    """Update the weights of a model's masked layers, in place; its masks stay.

    By least squares, or SparseGPT's way (arXiv 2301.00774); formulas stand beside the code of each.

    Args:
        model: with :class:`MaskedLinear` layers, or learnable ones, which become :class:`MaskedLinear` under their
            present masks. New weights are new parameters: a model that shared the old ones is left alone.
        method: one of :data:`METHODS`.
        calibration: an input tensor, batches, or :class:`~maskllm4v.sparsity.calibration.Calibration` parts.
        dense: the dense model that the masks belong to, which stays as it is. By default the model itself with its
            masks off, which is right as long as no weight was updated or folded.
        target: see :class:`UpdateMethod`; by default the method's first.
        damping: share of the Hessian's mean diagonal; by default the method's own.
        forward: ``forward(model, batch)``; by default :func:`maskllm4v.sparsity.calibration.default_forward`. Parts
            have their own.

    Returns:
        The same model. After an error it is as it was.

    Raises:
        ConfigError: an unknown method or target, a negative damping, no masked layer, or a ``dense`` that has masks
            or another architecture.
        DataError: no batch, none that reaches a layer, or a layer cannot be solved for; names layer and row.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    chosen = METHODS[method]
    if damping is not None and not (math.isfinite(damping) and damping >= 0):
        raise ConfigError(f"damping is {damping}; allowed: 0 or more")
    if target not in (None, *chosen.targets):
        raise ConfigError(f"target is {target!r}; allowed for {method!r}: {', '.join(map(repr, chosen.targets))}")
    masked = masked_layers(model)
    if not masked:
        raise ConfigError("nothing to update: the model has no masked layer")
    check_materialised(masked)
    if dense is not None and (dense is model or masked_layers(dense)):
        raise ConfigError("dense has masks; it is the model before it was pruned, or none: the model without its masks")
    parts = as_parts(calibration, forward)
    plain = {name: _plain(name, layer, dense) for name, layer in masked.items()}
    replace_(model, masked, lambda name, _: plain[name])
    done: dict[str, MaskedLinear] = {}
    try:
        asymmetric = (target or chosen.targets[0]) == "asymmetric"
        twin = (dense if dense is not None else copy.deepcopy(model)) if asymmetric else None
        for unit in bar(_statistics(model, plain, parts, chosen, twin), method):
            for name, statistic in unit.items():
                layer, mask = masked[name], masked[name].current_mask()
                weight = chosen.update_layer(
                    plain[name].weight.detach(),
                    mask,
                    statistic,
                    layer.pattern,
                    damping=chosen.damping if damping is None else damping,
                    layer=name,
                )
                if not torch.isfinite(weight).all():
                    raise DataError(f"layer {name!r}: updated weights are not finite")
                done[name] = _updated(layer, weight, mask, name)
                replace_(model, [name], lambda name, _: done[name])
    except BaseException:
        replace_(model, masked, lambda name, _: masked[name])
        raise
    return model


def _statistics(
    model: nn.Module, layers: dict[str, nn.Linear], parts: Any, method: UpdateMethod, dense: nn.Module | None
) -> Iterator[dict[str, Any]]:
    if method.layerwise:
        return layer_statistics(model, layers, parts, dense=dense)
    return part_statistics(model, layers, parts, Hessian, propagate="pruned")


def _plain(name: str, layer: nn.Linear, dense: nn.Module | None) -> nn.Linear:
    """A layer without its mask, and with the weight of the dense model if there is one."""
    plain = unmasked(layer)
    if dense is not None:
        weight = get_linear(dense, name).weight
        if weight.shape != layer.weight.shape:
            raise ConfigError(f"layer {name!r}: {tuple(layer.weight.shape)}, but {tuple(weight.shape)} in dense")
        plain.weight = weight
    return plain


def _updated(layer: Masked, weight: Tensor, mask: Tensor, name: str) -> MaskedLinear:
    updated = MaskedLinear.from_linear(layer, N=layer.pattern.n, M=layer.pattern.m)
    updated.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
    updated.set_mask(mask, name)
    return updated
