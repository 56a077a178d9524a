"""Modules whose parameters are read under masks, whoever reads them.

Many models read the weight of a layer that they never call: ``F.linear(x, self.qkv.weight, bias)`` in BEiT, EVA and
Swin, torch's fast path of an encoder layer. So a mask is no matter of a layer's ``forward``: the module becomes one of
a subclass whose property gives the masked parameter. The parameter itself stays in its place under its name, dense, and
so do hooks, references and all else; the mask is a submodule, ``weight_mask`` for ``weight``. State dicts keep their
keys and gain ``weight_mask.mask`` or ``weight_mask.logits``.

A property of a parameter that FSDP has cut up gives it as it is: FSDP puts whole ones in their places before they are
used. Tensor parallelism never does, and is refused.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.forwards import watch_forwards_
from maskllm4v.sparsity.learnable import LearnableMask
from maskllm4v.sparsity.masks import FixedMask, Mask
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import ConfigError


def is_cut_up(tensor: object) -> bool:
    """Whether it is a ``DTensor``, without importing that."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def mask_name(attribute: str) -> str:
    """The submodule that is the mask of a parameter."""
    return f"{attribute}_mask"


def _masked_property(attribute: str) -> property:
    def get(self: nn.Module) -> Tensor | None:
        if attribute not in self._parameters:  # not made yet, or deleted
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")
        weight = self._parameters[attribute]
        if weight is None or (type(weight) is not nn.Parameter and is_cut_up(weight)):
            return weight
        mask: Any = self._modules[mask_name(attribute)]
        read: Tensor = mask.read(weight)
        return read

    return property(get, doc=f"The parameter ``{attribute}`` under its mask; the dense one is ``dense_weight(layer)``.")


class Masked(nn.Module):
    """What modules with masked parameters have in common; made by :func:`attach_`, never by hand.

    Attributes:
        masked_attributes: of the class: names of the parameters that have a mask.
        dense_class: of the class: what the module is without masks.
    """

    masked_attributes: ClassVar[tuple[str, ...]] = ()
    dense_class: ClassVar[type[nn.Module]] = nn.Module

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name not in self.masked_attributes:
            super().register_parameter(name, param)
        elif is_cut_up(param):
            raise ConfigError(
                f"a masked {self.dense_class.__name__} cannot be cut up by tensor parallelism, which would ignore the "
                "mask; fold the model first"
            )
        else:  # without a look at what is there, which would cost a draw
            self._parameters[name] = param

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.masked_attributes == ("weight",):  # before masks were modules of their own
            for kind in ("mask", "logits"):
                if f"{prefix}{kind}" in state and kind not in self._parameters.keys() | self._buffers.keys():
                    state[f"{prefix}weight_mask.{kind}"] = state.pop(f"{prefix}{kind}")
        super()._load_from_state_dict(state, prefix, *args)


def dense_weight(layer: nn.Module, attribute: str = "weight") -> nn.Parameter:
    """A module's own parameter, dense, whether it has a mask or not.

    Raises:
        ConfigError: there is none of that name, for example because it is computed from others.
    """
    found = layer._parameters.get(attribute)
    if found is None:
        raise ConfigError(f"a {type(layer).__name__} without a parameter {attribute!r}")
    return found


def mask_of(layer: nn.Module, attribute: str = "weight") -> Mask | None:
    """The mask of a module's parameter, if it has one."""
    found = layer._modules.get(mask_name(attribute)) if isinstance(layer, Masked) else None
    return found if isinstance(found, Mask) else None


def attach_(module: nn.Module, attribute: str, mask: Mask) -> None:
    """Let whoever reads a parameter of a module get it under a mask, in place of the one that it has, if any.

    Raises:
        ConfigError: the module's class does not allow it; nothing is changed then.
    """
    base, known = _without_masks(module)
    name, cls = mask_name(attribute), type(module)
    if attribute not in known and (hasattr(cls, name) or name in (*module._modules, *module._buffers)):
        raise ConfigError(f"a {cls.__name__} has a {name!r} of its own already")
    try:
        module.__class__ = _masked_class(base, tuple(sorted({*known, attribute})), isinstance(mask, LearnableMask))
    except TypeError as error:
        raise ConfigError(f"a {cls.__name__} cannot be masked: {error}") from error
    module._modules[name] = mask.train(module.training)


def detach_(module: nn.Module, attribute: str) -> None:
    """Take the mask of a parameter off."""
    base, known = _without_masks(module)
    rest = tuple(other for other in known if other != attribute)
    learnable = any(isinstance(mask_of(module, other), LearnableMask) for other in rest)
    module._modules.pop(mask_name(attribute), None)
    module.__class__ = _masked_class(base, rest, learnable) if rest else base


def _without_masks(module: nn.Module) -> tuple[Any, tuple[str, ...]]:
    """A module's class without masks, and which parameters have one."""
    if not isinstance(module, Masked):
        return type(module), ()
    base: Any = module.dense_class
    attributes = module.masked_attributes
    if type(module) not in (_masked_class(base, attributes, False), _masked_class(base, attributes, True)):
        raise ConfigError(f"the masks of a {type(module).__name__} cannot be changed; do it before fully_shard")
    return base, attributes


@cache
def _masked_class(base: Any, attributes: tuple[str, ...], learnable: bool) -> Any:
    if base is nn.Linear and attributes == ("weight",):
        return LearnableMaskedLinear if learnable else MaskedLinear
    if learnable:  # which makes no difference to others
        return _masked_class(base, attributes, False)

    def reduce(self: nn.Module) -> Any:  # the class stands in no module where pickle could find it
        return _empty, (base, attributes), self.__getstate__()

    members: dict[str, Any] = {attribute: _masked_property(attribute) for attribute in attributes}
    members |= {"masked_attributes": attributes, "dense_class": base, "__reduce__": reduce, "__module__": __name__}
    return type(base)(f"Masked{base.__name__}", (Masked, base), members)


def _empty(base: Any, attributes: tuple[str, ...]) -> nn.Module:
    cls = _masked_class(base, attributes, False)
    empty: nn.Module = cls.__new__(cls)
    return empty


def _take_over(layer: nn.Module, linear: nn.Linear) -> None:
    """Become a linear layer that shares the parameters of another; nothing is drawn or copied."""
    with torch.device("meta"):
        new = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    new.weight, new.bias = dense_weight(linear), linear.bias
    layer.__dict__.update(new.train(linear.training).__dict__)


class _MaskedLinear(Masked, nn.Linear):
    masked_attributes = ("weight",)
    dense_class = nn.Linear
    weight_mask: Any

    @property
    def pattern(self) -> NMPattern:
        """Of the mask."""
        pattern: NMPattern = self.weight_mask.pattern
        return pattern

    def current_mask(self) -> Tensor:
        """The mask used at inference, boolean ``[out, in]``; the most probable one, if it is learned."""
        mask: Tensor = self.weight_mask.current_mask()
        return mask

    def fold(self) -> nn.Linear:
        """A plain ``nn.Linear`` whose pruned weights are zero."""
        folded, weight = nn.Linear.__new__(nn.Linear), dense_weight(self)
        _take_over(folded, self)
        folded.weight = nn.Parameter(self.weight_mask.fold(weight), requires_grad=weight.requires_grad)
        return folded

    def _become(self, linear: nn.Linear, mask: Mask) -> None:
        _take_over(self, linear)
        self._modules["weight_mask"] = mask.train(linear.training)
        watch_forwards_(self)


class MaskedLinear(_MaskedLinear):
    """``y = x (w ⊙ mask)ᵀ + b`` with a fixed boolean N:M mask ``[out, in]`` (Mishra et al., arXiv 2104.08378).

    Inputs are ``[..., in_features]``, outputs ``[..., out_features]``. The mask is ``weight_mask``, a
    :class:`~maskllm4v.sparsity.masks.FixedMask`; ``weight`` reads as masked, see :func:`dense_weight`.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        N, M: the pattern that the mask has to satisfy.

    A new layer has no mask; using it raises :class:`PatternError` until :meth:`set_mask` or a state dict
    brings one. Weights may be trained; masked ones get no gradient.
    """

    weight = _masked_property("weight")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, N: int = 2, M: int = 4) -> None:
        linear = nn.Linear(in_features, out_features, bias)
        self._become(linear, FixedMask(linear.weight, NMPattern(N, M)))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, N: int = 2, M: int = 4) -> MaskedLinear:
        """Take over a layer's parameters; the mask is still missing."""
        layer = cls.__new__(cls)
        layer._become(linear, FixedMask(dense_weight(linear), NMPattern(N, M)))
        return layer

    @property
    def mask(self) -> Tensor | None:
        """The mask, boolean ``[out, in]``; None as long as there is none."""
        mask: Tensor | None = self.weight_mask.mask
        return mask

    def set_mask(self, mask: Tensor, layer: str = "") -> None:
        """Install a mask ``[out, in]`` after checking its shape and every group; ``layer`` names it in messages."""
        self.weight_mask.name = layer or self.weight_mask.name
        self.weight_mask.set_mask(mask, dense_weight(self).device)


def _of_mask(name: str) -> Any:
    def get(self: nn.Module) -> Any:
        return getattr(self._modules["weight_mask"], name)

    def set_(self: nn.Module, value: Any) -> None:
        setattr(self._modules["weight_mask"], name, value)

    return property(get, set_, doc=f"``{name}`` of :class:`~maskllm4v.sparsity.learnable.LearnableMask`.")


class LearnableMaskedLinear(_MaskedLinear):
    """A frozen linear layer whose N:M mask is learned (MaskLLM, arXiv 2409.17481).

    Inputs are ``[..., in_features]``, outputs ``[..., out_features]``. In training mode each forward samples a soft
    mask; in evaluation mode the arg-max mask is used. Weight and bias are frozen. The mask is ``weight_mask``, a
    :class:`~maskllm4v.sparsity.learnable.LearnableMask`, whose attributes (``logits``, ``tau``, ...) the layer has,
    too; ``weight`` reads as masked, see :func:`dense_weight`.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        N, M: the pattern.
        name: the layer's name in its model, part of the noise's key.
        how: further keyword arguments of :class:`~maskllm4v.sparsity.learnable.LearnableMask`: ``gate``, ``hard``,
            ``tau``, ``scaling``, ``gate_std``, ``seed``.

    Raises:
        PatternError, ConfigError, ValueError: as there.
    """

    weight = _masked_property("weight")
    logits, candidates, gate, kept_energy = map(_of_mask, ("logits", "candidates", "gate", "kept_energy"))
    hard, tau, scaling, gate_std = map(_of_mask, ("hard", "tau", "scaling", "gate_std"))
    name, draw, auto_advance, backend = map(_of_mask, ("name", "draw", "auto_advance", "backend"))
    joined, dense_mode = map(_of_mask, ("joined", "dense_mode"))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        N: int = 2,
        M: int = 4,
        name: str = "",
        **how: Any,
    ) -> None:
        self._learn(nn.Linear(in_features, out_features, bias), NMPattern(N, M), name, how)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, N: int = 2, M: int = 4, name: str = "", **how: Any) -> Any:
        """Take over and freeze a layer's parameters; keyword arguments as in the constructor."""
        layer = cls.__new__(cls)
        layer._learn(linear, NMPattern(N, M), name, how)
        return layer

    def _learn(self, linear: nn.Linear, pattern: NMPattern, name: str, how: dict[str, Any]) -> None:
        self._become(linear, LearnableMask(dense_weight(linear), pattern, name, **how))
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)

    def masked_weight(
        self, uniform: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample a mask and apply it; see :meth:`maskllm4v.sparsity.learnable.LearnableMask.masked_weight`."""
        found: tuple[Tensor, Tensor] = self.weight_mask.masked_weight(dense_weight(self), uniform, dtype=dtype)
        return found
