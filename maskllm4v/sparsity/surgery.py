"""Finding, replacing and folding the linear layers of any model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.masks import LearnableMaskedLinear, MaskedLinear, NoiseKey
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import ConfigError, PatternError

Exclude = Iterable[nn.Module | str]
OnMisfit = Literal["error", "skip"]
Masked = MaskedLinear | LearnableMaskedLinear
Model = TypeVar("Model", bound=nn.Module)


def prunable_linears(
    model: nn.Module,
    pattern: NMPattern | None = None,
    *,
    exclude: Exclude = (),
    on_misfit: OnMisfit = "error",
) -> dict[str, nn.Linear]:
    """The linear layers that may be masked, by module name, in the model's order.

    Args:
        model: any module.
        pattern: if given, layers whose input width it does not divide are an error or are skipped.
        exclude: modules, or name patterns as in shells (``"head"``, ``"blocks.0.*"``); all below an
            excluded module is excluded too.
        on_misfit: ``"error"`` or ``"skip"``.

    Raises:
        PatternError: a layer does not fit and ``on_misfit`` is ``"error"``.
        ConfigError: an exclusion matches nothing.
    """
    if on_misfit not in ("error", "skip"):
        raise ConfigError(f"on_misfit is {on_misfit!r}; allowed: 'error', 'skip'")
    excluded = _excluded(model, exclude)
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module in excluded:
            continue
        if not name:
            raise ConfigError("the model is a single linear layer, which cannot be replaced in place; wrap it")
        if type(module) not in (nn.Linear, MaskedLinear, LearnableMaskedLinear):
            # E.g. the output projection of nn.MultiheadAttention, whose forward is never called: a mask
            # put there would be ignored without a word.
            warnings.warn(
                f"layer {name!r} is a {type(module).__name__}, not a plain nn.Linear; left dense", stacklevel=2
            )
            continue
        if pattern is not None and not pattern.fits(module.in_features):
            if on_misfit == "skip":
                continue
            pattern.check_fits(module.in_features, name)
        found[name] = module
    return found


def replace_linear_with_(
    model: Model,
    layer_class: type[MaskedLinear] | type[LearnableMaskedLinear],
    exclude: Exclude = (),
    *,
    N: int = 2,
    M: int = 4,
    on_misfit: OnMisfit = "error",
    **kwargs: Any,
) -> Model:
    """Replace every linear layer of a model, in place, at any depth.

    Parameters are shared with the layers replaced, not copied. Further keyword arguments reach every
    new layer::

        maskllm4v.replace_linear_with_(model, maskllm4v.LearnableMaskedLinear, exclude=[model.head],
                                       N=2, M=4, hard=False)

    Args:
        model: of any depth; not a single linear layer.
        layer_class: what layers become.
        exclude: modules or name patterns that stay as they are.
        N, M: the pattern.
        on_misfit: ``"error"`` or ``"skip"`` for layers that the pattern does not fit.

    Returns:
        The same model.

    Raises:
        ConfigError: ``exclude`` matches no layer, or the model is a single linear layer.
        PatternError: M does not divide a layer's inputs.
    """

    def new(name: str, linear: nn.Linear) -> nn.Linear:
        names = {"name": name} if issubclass(layer_class, LearnableMaskedLinear) else {}
        return layer_class.from_linear(linear, N=N, M=M, **names, **kwargs)

    linears = prunable_linears(model, NMPattern(N, M), exclude=exclude, on_misfit=on_misfit)
    replace_(model, linears, new)
    return model


def replace_(model: nn.Module, names: Iterable[str], new: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put ``new(name, old)`` in the place of each named layer, wherever the model refers to it."""
    replacements = {
        id(old): new(name, old) for name in names if isinstance(old := model.get_submodule(name), nn.Linear)
    }
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replacements and name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacements[id(module)])


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """All masked layers by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MaskedLinear | LearnableMaskedLinear)}


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name.

    Raises:
        ConfigError: there is none.
    """
    found = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(found, nn.Linear):
        raise ConfigError(f"the model has no linear layer {name!r}")
    if found is model:
        raise ConfigError("the model is a single linear layer, which cannot be replaced in place; wrap it")
    return found


def learnable_layers(model: nn.Module) -> dict[str, LearnableMaskedLinear]:
    """All layers whose mask is being learned, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LearnableMaskedLinear)}


def current_masks(model: nn.Module) -> dict[str, Tensor]:
    """The boolean masks ``[out, in]`` that a model uses at inference, by module name.

    Raises:
        PatternError: a layer has no mask yet.
    """
    return {name: layer.current_mask() for name, layer in masked_layers(model).items()}


def apply_masks_(model: Model, masks: Mapping[str, Tensor], pattern: NMPattern | str) -> Model:
    """Turn the named linear layers into :class:`MaskedLinear` with the masks given, in place.

    Args:
        model: dense, or masked already.
        masks: boolean ``[out, in]`` by module name.
        pattern: that all of them satisfy, such as ``"2:4"``.

    Returns:
        The same model.

    Raises:
        ConfigError: a mask names no linear layer, or has another shape than the layer's weight.
        PatternError: a mask breaks the pattern.
    """
    pattern = NMPattern(pattern)
    _check_masks(model, masks, pattern)

    def new(name: str, linear: nn.Linear) -> MaskedLinear:
        layer = MaskedLinear.from_linear(linear, N=pattern.n, M=pattern.m)
        layer.set_mask(masks[name], name)
        return layer

    replace_(model, masks, new)
    return model


def fold_(model: Model) -> Model:
    """Replace every masked layer by a plain ``nn.Linear`` whose pruned weights are zero, in place.

    Returns:
        The same model.

    Raises:
        ConfigError: the model is a single masked layer.
        PatternError: a layer has no mask yet.
    """
    layers = masked_layers(model)
    if "" in layers:
        raise ConfigError("the model is a single masked layer, which cannot be replaced in place; call its fold()")
    replace_(model, layers, lambda _, layer: layer.fold())  # type: ignore[operator]
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
) -> Model:
    """Freeze a model and make the masks of its linear layers learnable, in place.

    ``init="prior"``: logits l ~ N(0, σ²), shifted towards the prior mask P by
    α·std(l)·(⟨P, S_k⟩ − N²/M) (MaskLLM, arXiv 2409.17481, Eq. 9).
    ``init="magnitude"``: no randomness; l_k = ½ · the share of the group's Σw² that candidate k keeps.
    With ``gate="positions"``, l_j is shifted by α·std(l)·(P_j − N/M), or half weight j's share: as before for their
    sums over the positions of a mask.

    Args:
        model: dense, or pruned by :func:`maskllm4v.prune`; its weights are taken as they are.
        prior_masks: boolean masks by module name. ``None``: no prior, every layer not excluded.
        pattern: e.g. ``"2:4"``.
        prior_strength: α; 0 ignores the prior.
        gate_std: σ.
        init: see above.
        seed: seed of the logits and of the Gumbel noise.
        exclude: with ``prior_masks=None``: layers that stay dense.
        hard: straight-through masks.
        gate: what logits stand for, ``"candidates"`` or ``"positions"`` (:mod:`maskllm4v.sparsity.parameterization`).

    Raises:
        PatternError: a prior mask is of another shape or pattern.
        ConfigError: a prior mask names no linear layer of the model, or ``init`` or ``gate`` is unknown.
    """
    pattern = NMPattern(pattern)
    if init not in ("prior", "magnitude"):
        raise ConfigError(f"init is {init!r}; allowed: 'prior', 'magnitude'")
    if prior_masks is not None:
        _check_masks(model, prior_masks, pattern)
    names = list(prunable_linears(model, pattern, exclude=exclude) if prior_masks is None else prior_masks)
    model.requires_grad_(False)

    def new(name: str, linear: nn.Linear) -> LearnableMaskedLinear:
        std = gate_std if init == "prior" else 0.0
        layer = LearnableMaskedLinear.from_linear(
            linear, N=pattern.n, M=pattern.m, gate=gate, hard=hard, gate_std=std, name=name, seed=seed
        )
        with torch.no_grad():
            if init == "magnitude":
                layer.logits.copy_(layer.gate.magnitude(linear.weight.detach()))
            elif prior_masks is not None:
                mask = prior_masks[name].to(linear.weight.device)
                layer.logits.add_(
                    layer.gate.shift(mask).to(layer.logits), alpha=prior_strength * float(layer.logits.std())
                )
        return layer

    replace_(model, names, new)
    return model


def set_noise_key(model: nn.Module, draw: NoiseKey) -> None:
    """Say which noise all learnable masks of a model use from now on."""
    for layer in learnable_layers(model).values():
        layer.draw, layer.auto_advance = draw, False


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes with its dense weights: the teacher of a self-distillation."""
    before = {layer: layer.dense_mode for layer in learnable_layers(model).values()}
    for layer in before:
        layer.dense_mode = True
    try:
        yield
    finally:
        for layer, dense_mode in before.items():
            layer.dense_mode = dense_mode


def _excluded(model: nn.Module, exclude: Exclude) -> set[nn.Module]:
    """The excluded modules and all below them, by whichever of their names they were meant."""
    if isinstance(exclude, str | nn.Module):
        raise ConfigError("exclude is a list of modules or name patterns, not a single one")
    modules = list(model.named_modules(remove_duplicate=False))
    found: set[nn.Module] = set()
    for item in exclude:
        if isinstance(item, str):
            hits = [module for name, module in modules if name and fnmatchcase(name, item)]
        else:
            hits = [module for _, module in modules if module is item]
        if not hits:
            raise ConfigError(f"exclude: {item if isinstance(item, str) else type(item).__name__!r} matches no layer")
        found.update(below for module in hits for below in module.modules())
    return found


def _check_masks(model: nn.Module, masks: Mapping[str, Tensor], pattern: NMPattern) -> None:
    """All at once, before anything is changed."""
    if not masks:
        raise ConfigError("no masks given")
    for name, mask in masks.items():
        shape = get_linear(model, name).weight.shape
        if mask.shape != shape:
            raise PatternError(f"layer {name!r}: mask {tuple(mask.shape)} for a weight {tuple(shape)}")
        pattern.validate(mask, name)
