"""Correcting the weights that masks keep for those that they prune, in seconds and whatever the masks come from.

A method sees one layer at a time: its dense weight, its mask and the statistic of its inputs in the network as it
has become so far, masked and updated. No weight is trained.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.paired import layer_statistics
from maskllm4v.oneshot.activations.sequential import part_statistics
from maskllm4v.oneshot.activations.statistics import Hessian
from maskllm4v.oneshot.weight_update.least_squares import update_least_squares
from maskllm4v.oneshot.weight_update.sparsegpt import update_sparsegpt
from maskllm4v.sparsity.calibration import Calibration, Forward, as_parts, check_materialised, names_by_part
from maskllm4v.sparsity.layers import attach_, detach_
from maskllm4v.sparsity.layout import from_rows
from maskllm4v.sparsity.parameters import (
    MaskedParameter,
    Matrix,
    check_not_looked_up,
    find_matrix,
    masked_parameters,
)
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.rollback import all_or_nothing
from maskllm4v.sparsity.surgery import Model, fixed, settle_
from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.progress import bar
from maskllm4v.utils.text import few

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
    """Update the weights of a model's masked matrices, in place; its masks stay.

    By least squares, or SparseGPT's way (arXiv 2301.00774); formulas stand beside the code of each.

    Args:
        model: with masks; those that are learned become fixed, as they are at present. New weights are new parameters:
            a model that shared the old ones is left alone.
        method: one of :data:`METHODS`.
        calibration: an input tensor, batches, or :class:`~maskllm4v.sparsity.calibration.Calibration` parts.
        dense: the dense model that the masks belong to, which stays as it is. By default the model itself with its
            masks off, which is right as long as no weight was updated or folded.
        target: see :class:`UpdateMethod`; by default the method's first, but symmetric for layers of parts that are not
            :attr:`~maskllm4v.sparsity.calibration.Calibration.paired`.
        damping: share of the Hessian's mean diagonal; by default the method's own.
        forward: ``forward(model, batch)``; by default :func:`maskllm4v.sparsity.calibration.default_forward`. Parts
            have their own.

    Returns:
        The same model. After an error it is as it was.

    Warns:
        Layers get the symmetric target because their inputs are not paired; names them.

    Raises:
        ConfigError: an unknown method or target, a negative damping, no masked layer, one that is tied to an embedding,
            one that no part names, or whose inputs are not paired although the target is given as asymmetric; or a
            ``dense`` that has masks or another architecture.
        DataError: no batch, none that reaches a layer, or a layer cannot be solved for; names layer and row.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    chosen = METHODS[method]
    if damping is not None and not (math.isfinite(damping) and damping >= 0):
        raise ConfigError(f"damping is {damping}; allowed: 0 or more")
    if target not in (None, *chosen.targets):
        raise ConfigError(f"target is {target!r}; allowed for {method!r}: {', '.join(map(repr, chosen.targets))}")
    masked = masked_parameters(model)
    if not masked:
        raise ConfigError("nothing to update: the model has no masked layer")
    if "" in masked:
        raise ConfigError("the model is a single linear layer, which cannot be replaced in place; wrap it")
    check_materialised(masked)
    check_not_looked_up(masked)
    if dense is not None and (dense is model or masked_parameters(dense)):
        raise ConfigError("dense has masks; it is the model before it was pruned, or none: the model without its masks")
    parts = as_parts(calibration, forward)
    asymmetric = (target or chosen.targets[0]) == "asymmetric"
    if asymmetric:
        _check_paired(masked, parts, target)
    sources = masked if dense is None else {name: _twin(parameter, dense) for name, parameter in masked.items()}
    trained = {name: parameter.weight.requires_grad for name, parameter in masked.items()}
    with all_or_nothing(model), ExitStack() as stack:
        for name, parameter in masked.items():
            weight = sources[name].weight
            for module, attribute in parameter.places:
                detach_(module, attribute)
                module._parameters[attribute] = weight
        twin = (dense if dense is not None else copy.deepcopy(model)) if asymmetric else None
        statistics = stack.enter_context(closing(_statistics(model, masked, parts, chosen, twin)))
        for unit in bar(statistics, method):
            for name, statistic in unit.items():
                parameter, mask = masked[name], masked[name].mask.current_mask()
                share = chosen.damping if damping is None else damping

                def update(rows: Tensor, of_rows: Tensor, seen: Any, layer: str = name, share: float = share) -> Tensor:
                    pattern = masked[layer].mask.pattern
                    return chosen.update_layer(rows, of_rows, seen, pattern, damping=share, layer=layer)

                rows = _by_blocks(parameter, mask, statistic, update)
                if not torch.isfinite(rows).all():
                    raise DataError(f"layer {name!r}: updated weights are not finite")
                values = from_rows(rows, parameter.layout, parameter.weight.shape).contiguous()
                new = nn.Parameter(values, requires_grad=trained[name])
                for module, attribute in parameter.places:
                    module._parameters[attribute] = new
                under = fixed(parameter, mask, parameter.mask.pattern)
                for module, attribute in parameter.places:
                    attach_(module, attribute, under)
        settle_(model)
        return model


def _check_paired(layers: Iterable[str], parts: Sequence[Calibration], target: Target | None) -> None:
    """Say which layers cannot have the asymmetric target: an error where it was asked for, else a warning."""
    names = [n for part, own in zip(parts, names_by_part(layers, parts), strict=True) if not part.paired for n in own]
    if not names:
        return
    why = f"{few(names, 'layer')}: not the same tokens in the dense and in the pruned network (paired=False)"
    if target is not None:
        raise ConfigError(f"target is {target!r}, but {why}; allowed: 'symmetric', or none, which is that for them")
    warnings.warn(f"{why}; updated by the symmetric target", stacklevel=3)


def _by_blocks(matrix: Matrix, mask: Tensor, statistic: Any, update_layer: Callable[..., Tensor]) -> Tensor:
    """Update a matrix, or its blocks one after the other, each with the statistic of its own inputs."""
    rows = matrix.rows.detach()
    if matrix.blocks == 1:
        return update_layer(rows, mask, statistic)
    parts = zip(
        rows.flatten(0, -2).chunk(matrix.blocks), mask.flatten(0, -2).chunk(matrix.blocks), statistic, strict=True
    )
    # What an expert without tokens computes in the calibration is nothing: nothing can be said of its weights.
    done = [update_layer(w, m, one) if one.rows else w.masked_fill(~m, 0) for w, m, one in parts]
    return torch.cat(done).view(rows.shape)


def _statistics(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    parts: Sequence[Calibration],
    method: UpdateMethod,
    dense: nn.Module | None,
) -> Generator[dict[str, Any], None, None]:
    if method.layerwise:
        return layer_statistics(model, layers, parts, dense=dense)
    return part_statistics(model, layers, parts, Hessian, propagate="pruned")


def _twin(parameter: MaskedParameter, dense: nn.Module) -> Matrix:
    """The same matrix in the dense model."""
    twin = find_matrix(dense, parameter.name)
    shape, wanted = tuple(twin.weight.shape), tuple(parameter.weight.shape)
    if shape != wanted:
        raise ConfigError(f"layer {parameter.name!r}: {wanted}, but {shape} in dense")
    return twin
