"""Putting masks on the parameters of any model, changing them, and folding them away."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.forwards import watch_forwards_
from maskllm4v.sparsity.layers import LearnableMaskedLinear, MaskedLinear, attach_, detach_
from maskllm4v.sparsity.learnable import LearnableMask, NoiseKey
from maskllm4v.sparsity.masks import FixedMask, Mask
from maskllm4v.sparsity.parameters import Matrix, find_matrix, learnable_masks, masked_parameters
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.rollback import all_or_nothing
from maskllm4v.sparsity.survey import Exclude, OnMisfit, survey
from maskllm4v.utils.errors import ConfigError, PatternError

Model = TypeVar("Model", bound=nn.Module)


def replace_linear_with_(
    model: Model,
    layer_class: type[MaskedLinear] | type[LearnableMaskedLinear],
    exclude: Exclude = (),
    *,
    N: int = 2,
    M: int = 4,
    on_misfit: OnMisfit = "error",
    convolutions: bool = False,
    tied: bool = False,
    **kwargs: Any,
) -> Model:
    """Put a mask on every matrix of a model, in place, at any depth.

    Modules and parameters stay the objects that they are; linear layers become instances of ``layer_class``. Further
    keyword arguments reach every new mask::

        maskllm4v.replace_linear_with_(model, maskllm4v.LearnableMaskedLinear, exclude=[model.head],
                                       N=2, M=4, hard=False)

    Args:
        model: of any depth; not a single linear layer.
        layer_class: what layers become.
        exclude: modules or name patterns that stay as they are.
        N, M: the pattern.
        on_misfit: ``"error"`` or ``"skip"`` for matrices that the pattern does not fit.
        convolutions, tied: as in :func:`maskllm4v.prune`.

    Returns:
        The same model.

    Raises:
        ConfigError: ``exclude`` matches no layer, the model is a single linear layer, or a weight is no parameter.
        PatternError: M does not divide a matrix's inputs.

    Warns:
        Less than half of the weights that multiply activations, and are not excluded, gets masks.
    """
    pattern, learnable = NMPattern(N, M), issubclass(layer_class, LearnableMaskedLinear)
    found = survey(model, pattern, exclude=exclude, on_misfit=on_misfit, convolutions=convolutions, tied=tied)
    kind: Callable[..., Mask] = LearnableMask if learnable else FixedMask

    def new(matrix: Matrix) -> Mask:
        if learnable:
            for parameter in itertools.chain.from_iterable(module._parameters.values() for module, _ in matrix.places):
                if parameter is not None:
                    parameter.requires_grad_(False)
        return kind(matrix.weight, pattern, matrix.name, matrix.layout, **kwargs)

    with all_or_nothing(model):
        put_masks_(model, found.prunable.values(), new)
        found.coverage.check()
        found.warn_of_embeddings(pattern)
        return model


def put_masks_(model: nn.Module, matrices: Iterable[Matrix], new: Callable[[Matrix], Mask]) -> None:
    """Put ``new(matrix)`` on each matrix, in all places where it stands; all of them or, after an error, none."""
    with all_or_nothing(model):
        for matrix in matrices:
            mask = new(matrix)
            for module, attribute in matrix.places:
                attach_(module, attribute, mask)
        settle_(model)


def settle_(model: nn.Module) -> None:
    """Give masks that were attached the modes of their modules, and tell them of the model's forwards."""
    for parameter in masked_parameters(model).values():
        parameter.mask.train(parameter.module.training)
    watch_forwards_(model)


def replace_(model: nn.Module, names: Iterable[str], new: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put ``new(name, old)`` in the place of each named layer, wherever the model refers to it."""
    replacements = {
        id(old): new(name, old) for name in names if isinstance(old := model.get_submodule(name), nn.Linear)
    }
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replacements and name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacements[id(module)])


def apply_masks_(model: Model, masks: Mapping[str, Tensor], pattern: NMPattern | str) -> Model:
    """Put the masks given on the named matrices, in place; linear layers become :class:`MaskedLinear`.

    Args:
        model: dense, or masked already.
        masks: boolean ``[..., out, in]`` by name: a module's, or a parameter's that is not called ``weight``.
        pattern: that all of them satisfy, such as ``"2:4"``.

    Returns:
        The same model.

    Raises:
        ConfigError: a mask names no matrix.
        PatternError: a mask breaks the pattern, or has another shape than the weight.
    """
    pattern = NMPattern(pattern)
    matrices = _check_masks(model, masks, pattern)
    with all_or_nothing(model):
        put_masks_(model, matrices.values(), lambda matrix: fixed(matrix, masks[matrix.name], pattern))
        return model


def fixed(matrix: Matrix, mask: Tensor, pattern: NMPattern) -> FixedMask:
    """A matrix's mask that is not learned."""
    new = FixedMask(matrix.weight, pattern, matrix.name, matrix.layout)
    new.set_mask(mask, matrix.weight.device)
    return new


def fold_(model: Model) -> Model:
    """Write zeros where masks are, and take the masks off, in place.

    Folded parameters are new ones, tied as before; who holds the old ones has dense weights.

    Returns:
        The same model.

    Raises:
        ConfigError: the model is a single masked layer.
        PatternError: a mask is missing yet.
    """
    masked = masked_parameters(model)
    if "" in masked:
        raise ConfigError("the model is a single masked layer, which cannot be replaced in place; call its fold()")
    with all_or_nothing(model):
        for parameter in masked.values():
            weight = parameter.weight
            folded = nn.Parameter(parameter.mask.fold(weight), requires_grad=weight.requires_grad)
            for module, attribute in parameter.places:
                detach_(module, attribute)
                module._parameters[attribute] = folded
        settle_(model)
        return model


def make_learnable(
    model: Model,
    prior_masks: Mapping[str, Tensor] | None,
    *,
    pattern: NMPattern | str | tuple[int, int],
    prior_strength: float = 3.0,
    gate_std: float = 0.2,
    init: Literal["prior", "magnitude"] = "prior",
    seed: int = 0,
    exclude: Exclude = (),
    hard: bool = False,
    gate: str = "candidates",
    convolutions: bool = False,
    tied: bool = False,
) -> Model:
    """Freeze a model and make the masks of its matrices learnable, in place.

    ``init="prior"``: logits l ~ N(0, σ²), shifted towards the prior mask P by
    α·std(l)·(⟨P, S_k⟩ − N²/M) (MaskLLM, arXiv 2409.17481, Eq. 9).
    ``init="magnitude"``: no randomness; l_k = ½ · the share of the group's Σw² that candidate k keeps.
    With ``gate="positions"``, l_j is shifted by α·std(l)·(P_j − N/M), or half weight j's share: as before for their
    sums over the positions of a mask.

    Args:
        model: dense, or pruned by :func:`maskllm4v.prune`; its weights are taken as they are.
        prior_masks: boolean masks ``[..., out, in]`` by name. ``None``: no prior, every matrix not excluded.
        pattern: e.g. ``"2:4"``.
        prior_strength: α; 0 ignores the prior.
        gate_std: σ.
        init: see above.
        seed: seed of the logits and of the Gumbel noise.
        exclude: with ``prior_masks=None``: layers that stay dense.
        convolutions, tied: with ``prior_masks=None``: as in :func:`maskllm4v.prune`.
        hard: straight-through masks.
        gate: what logits stand for, ``"candidates"`` or ``"positions"`` (:mod:`maskllm4v.sparsity.parameterization`).

    Raises:
        PatternError: a prior mask is of another shape or pattern.
        ConfigError: a prior mask names no matrix of the model, ``init`` or ``gate`` is unknown, or ``prior_strength``
            or ``gate_std`` is negative or no number.
    """
    pattern = NMPattern(pattern)
    for key, value in {"prior_strength": prior_strength, "gate_std": gate_std}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{key} is {value}; allowed: 0 or more")
    if init not in ("prior", "magnitude"):
        raise ConfigError(f"init is {init!r}; allowed: 'prior', 'magnitude'")
    if prior_masks is None:
        found = survey(model, pattern, exclude=exclude, convolutions=convolutions, tied=tied)
        matrices = found.prunable
    else:
        matrices = _check_masks(model, prior_masks, pattern)

    def new(matrix: Matrix) -> LearnableMask:
        std = gate_std if init == "prior" else 0.0
        mask = LearnableMask(
            matrix.weight, pattern, matrix.name, matrix.layout, gate=gate, hard=hard, gate_std=std, seed=seed
        )
        with torch.no_grad():
            if init == "magnitude":
                mask.logits.copy_(mask.gate.magnitude(matrix.rows.detach()))
            elif prior_masks is not None:
                prior = prior_masks[matrix.name].to(matrix.weight.device)
                mask.logits.add_(
                    mask.gate.shift(prior).to(mask.logits), alpha=prior_strength * float(mask.logits.std())
                )
        return mask

    with all_or_nothing(model):
        model.requires_grad_(False)
        put_masks_(model, matrices.values(), new)
        if prior_masks is None:
            found.coverage.check()
            found.warn_of_embeddings(pattern)
        return model


def set_noise_key(model: nn.Module, draw: NoiseKey) -> None:
    """Say which noise all learnable masks of a model use from now on."""
    for mask in learnable_masks(model).values():
        mask.draw, mask.auto_advance = draw, False


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes with its dense weights: the teacher of a self-distillation."""
    before = {parameter.mask: parameter.mask.dense_mode for parameter in masked_parameters(model).values()}
    for mask in before:
        mask.dense_mode = True
    try:
        yield
    finally:
        for mask, dense_mode in before.items():
            mask.dense_mode = dense_mode


def _check_masks(model: nn.Module, masks: Mapping[str, Tensor], pattern: NMPattern) -> dict[str, Matrix]:
    """The matrices that masks belong to. All are checked at once, before anything is changed."""
    if not masks:
        raise ConfigError("no masks given")
    found: dict[str, Matrix] = {}
    for name, mask in masks.items():
        matrix = found[name] = find_matrix(model, name)
        if mask.shape != matrix.rows.shape:
            raise PatternError(f"layer {name!r}: mask {tuple(mask.shape)} for a weight {tuple(matrix.rows.shape)}")
        pattern.validate(mask, name)
    return found
