"""One-shot pruning of any model, by methods that stand in a registry.

A method sees one layer at a time: its weight, the statistic of its inputs that it asked for, and the
pattern. Add your own with :func:`register_pruner`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.sequential import Propagate, part_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm, Statistic, Sums
from maskllm4v.oneshot.methods.magnitude import prune_magnitude
from maskllm4v.oneshot.methods.random import prune_random
from maskllm4v.oneshot.methods.result import Pruned
from maskllm4v.oneshot.methods.ria import prune_ria
from maskllm4v.oneshot.methods.sparsegpt import prune_sparsegpt
from maskllm4v.oneshot.methods.wanda import prune_wanda
from maskllm4v.sparsity.calibration import Calibration, Forward, as_parts, check_materialised
from maskllm4v.sparsity.layers import attach_
from maskllm4v.sparsity.parameters import Matrix, check_not_looked_up
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.rollback import all_or_nothing
from maskllm4v.sparsity.surgery import fixed, settle_
from maskllm4v.sparsity.survey import Coverage, Exclude, OnMisfit, survey
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.progress import bar, note

__all__ = ["PrunedMasks", "PruningMethod", "Pruned", "available", "calibrates", "prune", "register_pruner"]


class LayerPruner(Protocol):
    """How a method prunes one layer."""

    def __call__(
        self, weight: Tensor, statistic: Any, pattern: NMPattern, *, update_weights: bool, layer: str, seed: int
    ) -> Pruned:
        """Choose a mask for a weight ``[out, in]``, and new weights if asked and able to."""


@dataclass(frozen=True)
class PruningMethod:
    """A one-shot method and what it needs.

    Attributes:
        prune_layer: see :class:`LayerPruner`.
        statistic: class of the calibration statistic, or None for methods without data.
        updates: whether it can update weights.
        propagate: what later layers see by default while calibrating.
    """

    prune_layer: LayerPruner
    statistic: type[Statistic] | None = None
    updates: bool = False
    propagate: Propagate = "dense"


_METHODS: dict[str, PruningMethod] = {
    "magnitude": PruningMethod(prune_magnitude),
    "random": PruningMethod(prune_random),
    "wanda": PruningMethod(prune_wanda, InputNorm),
    "ria": PruningMethod(prune_ria, InputNorm, propagate="pruned"),
    "sparsegpt": PruningMethod(prune_sparsegpt, Hessian, updates=True, propagate="pruned"),
}


def available() -> list[str]:
    """Names of all registered methods."""
    return sorted(_METHODS)


def calibrates(method: str) -> bool:
    """Whether a method looks at inputs.

    Raises:
        ConfigError: there is no such method.
    """
    return _method(method).statistic is not None


def _method(name: str) -> PruningMethod:
    if name not in _METHODS:
        raise ConfigError(f"method is {name!r}; allowed: {', '.join(available())}")
    return _METHODS[name]


def register_pruner(
    name: str,
    *,
    statistic: type[Statistic] | None = None,
    updates: bool = False,
    propagate: Propagate = "dense",
) -> Callable[[LayerPruner], LayerPruner]:
    """Add a method of one's own to the registry::

        from maskllm4v.oneshot.prune import Pruned

        @maskllm4v.register_pruner("smallest-first")
        def smallest_first(weight, statistic, pattern, *, update_weights, layer, seed):
            return Pruned(pattern.topn_mask(-weight.abs(), layer))

    Args:
        name: for :func:`prune` and ``priors.<row>.method``.
        statistic: what it has to know of a layer's inputs, from :mod:`maskllm4v.oneshot.activations.statistics`.
        updates: whether it can update the weights ``[out, in]`` that it keeps.
        propagate: what later layers see by default while calibrating, ``"dense"`` or ``"pruned"``.

    Returns:
        A decorator, which gives the function back.

    Raises:
        ConfigError: the name is taken.
    """

    def register(prune_layer: LayerPruner) -> LayerPruner:
        if name in _METHODS:
            raise ConfigError(f"a pruning method named {name!r} exists already")
        _METHODS[name] = PruningMethod(prune_layer, statistic, updates, propagate)
        return prune_layer

    return register


class PrunedMasks(dict[str, Tensor]):
    """Boolean masks ``[..., out, in]`` by name.

    Attributes:
        coverage: which weights they cover, and why others stay dense.
    """

    coverage: Coverage


def prune(
    model: nn.Module,
    method: str,
    *,
    pattern: NMPattern | str | tuple[int, int] = "2:4",
    calibration: Iterable[Any] | Tensor | Calibration | None = None,
    exclude: Exclude = (),
    update_weights: bool = False,
    propagate: Propagate | None = None,
    forward: Forward | None = None,
    on_misfit: OnMisfit = "error",
    convolutions: bool = False,
    tied: bool = False,
    seed: int = 0,
    tell: Callable[[str], object] = note,
) -> PrunedMasks:
    """Prune the matrices of a model in one shot, in place.

    By magnitude, Wanda (arXiv 2306.11695), RIA (Zhang et al., ICLR 2024), SparseGPT (arXiv 2301.00774), at random, or
    by a registered method.

    Args:
        model: any module; its matrices get masks, and keep their dense weights, or get updated ones if asked for.
            Linear layers become :class:`MaskedLinear`.
        method: one of :func:`available`.
        pattern: e.g. ``"2:4"``.
        calibration: for methods that look at inputs: an input tensor, an iterable of batches, or a sequence of
            :class:`maskllm4v.sparsity.calibration.Calibration` parts, where not all layers see the same batches.
        exclude: modules or name patterns that stay dense.
        update_weights: let the method correct the kept weights for the pruned ones.
        propagate: whether later layers are calibrated on the ``"dense"`` or the already ``"pruned"``
            network; by default what the method's authors (Wanda: the vision original) do.
        forward: ``forward(model, batch)``; by default :func:`maskllm4v.sparsity.calibration.default_forward`. Parts
            have their own.
        on_misfit: ``"error"`` or ``"skip"`` for layers that the pattern does not fit.
        convolutions: prune those, too, that multiply each patch of their inputs once: 1×1, or with a kernel as wide as
            the stride; without padding and groups. Masks are ``[out, in]``, inputs in the order of
            :mod:`maskllm4v.sparsity.layout`.
        tied: prune matrices, too, that are the table of an embedding; both read it under one mask.
        seed: for methods that draw.
        tell: called with the report of what is sparse, what stays dense, and why; by default a terminal shows it.

    Returns:
        Boolean masks ``[..., out, in]`` by name: a module's, or a parameter's that is not called ``weight``; the same
        report is their ``coverage``. After an error, or Ctrl-C, the model is as it was.

    Warns:
        Less than half of the weights that multiply activations, and are not excluded, gets masks; or an embedding does.

    Raises:
        ConfigError: unknown method, no calibration data for one that needs it or for a layer, no update on
            offer, one of a matrix that is the table of an embedding, or weights without values (device ``meta``).
        DataError: no batch, or none that reaches a layer.
        PatternError: the pattern does not fit a layer.
    """
    chosen, pattern = _method(method), NMPattern(pattern)
    if update_weights and not chosen.updates:
        raise ConfigError(f"update_weights is true, but {method!r} cannot update weights")
    if propagate not in (None, "dense", "pruned"):
        raise ConfigError(f"propagate is {propagate!r}; allowed: 'dense', 'pruned'")
    found = survey(model, pattern, exclude=exclude, on_misfit=on_misfit, convolutions=convolutions, tied=tied)
    layers = found.prunable
    if not layers:
        raise ConfigError("nothing to prune: the model has no linear layer, nor another matrix, that is not excluded")
    check_materialised(layers)
    if update_weights:
        check_not_looked_up(layers)
    parts = [] if chosen.statistic is None else _parts(method, calibration, forward)
    masks = PrunedMasks()
    masks.coverage = found.coverage
    with all_or_nothing(model) as rollback:

        def prune_layer(name: str, statistic: Any) -> None:
            matrix = layers[name]

            def prune_rows(rows: Tensor, seen: Any) -> Pruned:
                return chosen.prune_layer(rows, seen, pattern, update_weights=update_weights, layer=name, seed=seed)

            result = _by_blocks(matrix, statistic, prune_rows, pattern)
            if result.weight is not None:
                rollback.keep(matrix.weight)
                matrix.write_(result.weight)
            mask = fixed(matrix, result.mask, pattern)
            for module, attribute in matrix.places:
                attach_(module, attribute, mask)
            masks[name] = result.mask

        if chosen.statistic is None:
            for name in layers:
                prune_layer(name, None)
        else:
            how = propagate or chosen.propagate
            statistics = part_statistics(model, layers, parts, chosen.statistic, propagate=how)
            with closing(statistics):
                for unit in bar(statistics, method):
                    for name in unit:
                        prune_layer(name, unit[name])
        settle_(model)
        tell(str(masks.coverage))
        masks.coverage.check()
        found.warn_of_embeddings(pattern)
        return masks


def _by_blocks(
    matrix: Matrix, statistic: Any, prune_rows: Callable[[Tensor, Any], Pruned], pattern: NMPattern
) -> Pruned:
    """Prune a matrix, or its blocks one after the other, each with the statistic of its own inputs.

    Experts that no token of the calibration came to are pruned by magnitude, with a warning.
    """
    rows = matrix.rows.detach()
    if statistic is None or matrix.blocks == 1:
        flat = prune_rows(rows.flatten(0, -2), statistic)
        return Pruned(flat.mask.view(rows.shape), None if flat.weight is None else flat.weight.view(rows.shape))
    parts = rows.flatten(0, -2).chunk(matrix.blocks)
    idle = [i for i, one in enumerate(statistic) if isinstance(one, Sums) and not one.rows]
    if idle:
        warnings.warn(
            f"layer {matrix.name!r}: no token came to {len(idle)} of {len(parts)} experts, pruned by magnitude: "
            f"{', '.join(map(str, idle))}",
            stacklevel=3,
        )
    done = [
        Pruned(pattern.topn_mask(part.abs(), matrix.name)) if i in idle else prune_rows(part, one)
        for i, (part, one) in enumerate(zip(parts, statistic, strict=True))
    ]
    updated = any(one.weight is not None for one in done)
    weights = [part if one.weight is None else one.weight for part, one in zip(parts, done, strict=True)]
    mask = torch.cat([one.mask for one in done]).view(rows.shape)
    return Pruned(mask, torch.cat(weights).view(rows.shape) if updated else None)


def _parts(method: str, calibration: Any, forward: Forward | None) -> Sequence[Calibration]:
    if calibration is None:
        raise ConfigError(f"{method!r} needs calibration data; give it with `calibration`")
    return as_parts(calibration, forward)
