"""The parameters of a model that multiply activations, and those of them that are under masks.

Everything is found by parameter: one that several modules share is one matrix, and has one mask. What multiplies
activations is told by the kind of its module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from maskllm4v.sparsity.layers import Masked, dense_weight, mask_of
from maskllm4v.sparsity.layout import Layout, from_rows, to_rows
from maskllm4v.sparsity.learnable import LearnableMask
from maskllm4v.sparsity.masks import Mask
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.text import few

EXPERTS = ("gate_up_proj", "up_proj", "gate_proj", "down_proj")  # of transformers' stacks, each ``[experts, ...]``
Places = tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter that multiplies activations.

    Attributes:
        name: of its module, if the parameter is called ``weight``; else of the parameter. Tied ones go by their first.
        key: in the model's state dict.
        places: modules that hold it, and under which name.
        layout: how it holds its rows.
    """

    name: str
    key: str
    places: Places
    layout: Layout = "rows"

    @property
    def module(self) -> nn.Module:
        """The first that holds it."""
        return self.places[0][0]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, dense."""
        return dense_weight(*self.places[0])

    @property
    def blocks(self) -> int:
        """Equal parts of the rows that may see inputs of their own: the experts of a stack; query, key and value."""
        rows = self.rows
        return int(rows.shape[0]) if rows.dim() == 3 else 3 if self.places[0][1] == "in_proj_weight" else 1

    @property
    def not_multiplied_in(self) -> list[nn.Module]:
        """Modules that hold it and are not known to multiply by it, such as an embedding that it is the table of."""
        return [module for module, attribute in self.places if layout_of(module, attribute) is None]

    @property
    def shape(self) -> torch.Size:
        """Of the parameter as it is stored."""
        return self.weight.shape

    @property
    def in_features(self) -> int:
        return int(self.rows.shape[-1])

    @property
    def stored(self) -> dict[str, Any] | None:
        """How files say what it is, if it is not ``[out, in]``: as :func:`stored_rows` takes it."""
        if self.layout == "rows" and self.weight.dim() == 2:
            return None
        return {"layout": self.layout, "shape": list(self.weight.shape)}

    @property
    def rows(self) -> Tensor:
        """``[..., out, in]`` of the dense parameter; to be read only, see :meth:`write_`."""
        return to_rows(self.weight, self.layout)

    @torch.no_grad()
    def write_(self, rows: Tensor) -> None:
        """Give the dense parameter the values of rows ``[..., out, in]``."""
        self.weight.copy_(from_rows(rows, self.layout, self.weight.shape))


@dataclass(frozen=True, eq=False)
class MaskedParameter(Matrix):
    """A parameter under a mask."""

    mask: Mask = field(default=None)  # type: ignore[assignment]

    @property
    def learnable(self) -> LearnableMask:
        assert isinstance(self.mask, LearnableMask)
        return self.mask


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """All parameters of a model that multiply activations, in its order; tied ones once."""
    places = places_of(model)
    done = set[int]()
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            layout = layout_of(module, attribute)
            if parameter is None or layout is None or id(parameter) in done:
                continue
            done.add(id(parameter))
            key = f"{path}.{attribute}"
            yield Matrix(_name_of(key), key.lstrip("."), places[id(parameter)], layout)


def find_matrix(model: nn.Module, name: str) -> Matrix:
    """The matrix of that name; of a tied one any of its names will do.

    Raises:
        ConfigError: there is none, or the model is nothing but a linear layer.
    """
    module: Any = dict(model.named_modules(remove_duplicate=False)).get(name)
    path, attribute = name, "weight"
    if module is None or layout_of(module, attribute) is None:
        path, _, attribute = name.rpartition(".")
        module = dict(model.named_modules(remove_duplicate=False)).get(path)
    layout = None if module is None else layout_of(module, attribute)
    if layout is None:
        raise ConfigError(f"the model has no linear layer {name!r}, nor another matrix of that name")
    if module is model and name == "":
        raise ConfigError("the model is a single linear layer, which cannot be replaced in place; wrap it")
    check_parameter(module, name, attribute)
    return Matrix(name, f"{path}.{attribute}".lstrip("."), places_of(model)[id(module._parameters[attribute])], layout)


def masked_parameters(model: nn.Module) -> dict[str, MaskedParameter]:
    """All parameters under a mask, by name, in the model's order."""
    places: dict[Mask, list[tuple[nn.Module, str]]] = {}
    keys: dict[tuple[nn.Module, str], str] = {}  # in the model's order
    for path, module in model.named_modules():
        for attribute in module._parameters if isinstance(module, Masked) else ():
            if (mask := mask_of(module, attribute)) is not None:
                places.setdefault(mask, []).append((module, attribute))
                keys[module, attribute] = f"{path}.{attribute}"
    firsts = {(in_order := _products_first(found))[0]: (in_order, mask) for mask, found in places.items()}
    masked: dict[str, MaskedParameter] = {}
    for place, key in keys.items():
        if place in firsts:
            in_order, mask = firsts[place]
            masked[_name_of(key)] = MaskedParameter(_name_of(key), key.lstrip("."), in_order, mask.layout, mask)
    return masked


def learnable_masks(model: nn.Module) -> dict[str, LearnableMask]:
    """All masks that are being learned, by the name of their parameter."""
    return {name: p.mask for name, p in masked_parameters(model).items() if isinstance(p.mask, LearnableMask)}


def current_masks(model: nn.Module) -> dict[str, Tensor]:
    """The boolean masks ``[..., out, in]`` that a model uses at inference, by the name of their parameter.

    Raises:
        PatternError: one is missing yet.
    """
    return {name: parameter.mask.current_mask() for name, parameter in masked_parameters(model).items()}


def dense_weights(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The named matrices, dense, by key in the model's state dict."""
    found = [find_matrix(model, name) for name in names]
    return {matrix.key: matrix.weight for matrix in found}


def state_key(name: str, keys: Iterable[str] | Mapping[str, Any]) -> str:
    """The key of a matrix in a state dict: that of a layer's weight, or of a parameter that has another name."""
    return f"{name}.weight" if f"{name}.weight" in keys else name


def _name_of(key: str) -> str:
    """A matrix's name, which is empty for the weight of a model that is a single layer."""
    return key.removesuffix(".weight").lstrip(".")


def layout_of(module: nn.Module, attribute: str) -> Layout | None:
    """How a module's parameter holds its rows; None if it is not known to multiply activations."""
    if isinstance(module, nn.Linear):
        return "rows" if attribute == "weight" else None
    if isinstance(module, nn.MultiheadAttention):
        return "rows" if attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") else None
    parameter = module._parameters.get(attribute)
    if parameter is None or is_lazy(parameter):
        return None
    if attribute == "weight" and multiplies_patches(module):
        return "patches"
    if parameter.dim() == 2 and attribute == "weight" and _is_conv1d(module):
        return "columns"
    if parameter.dim() == 3 and attribute in EXPERTS and hasattr(module, "num_experts"):
        return "columns" if getattr(module, "is_transposed", False) else "rows"
    return None


def multiplies_patches(module: nn.Module) -> bool:
    """Whether it is a convolution that multiplies each patch of its inputs once, as PyTorch does it.

    1×1, or with a kernel as wide as the stride; without padding and groups.
    """
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, kind):
            own = type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward
            single = set(module.kernel_size) == {1}
            parted = single or (module.kernel_size == module.stride and set(module.dilation) == {1})
            padded = not isinstance(module.padding, str) and any(module.padding)  # "same" pads no 1×1
            return own and parted and not padded and module.groups == 1
    return False


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' transposed linear layer, that of GPT-2."""
    return type(module).__name__.removeprefix("Masked") == "Conv1D" and hasattr(module, "nf")


def places_of(model: nn.Module) -> dict[int, Places]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return {key: _products_first(places) for key, places in found.items()}


def _products_first(places: list[tuple[nn.Module, str]]) -> Places:
    """Those that multiply by the parameter before those that look it up, such as embeddings."""
    if len(places) > 1:
        places = sorted(places, key=lambda place: layout_of(*place) is None)
    return tuple(places)


def check_not_looked_up(matrices: Mapping[str, Matrix]) -> None:
    """Raise :class:`ConfigError`, naming matrices, where an update for what they multiply would change embeddings."""
    if tables := [name for name, matrix in matrices.items() if matrix.not_multiplied_in]:
        raise ConfigError(
            f"{few(tables, 'layer')}: tied to an embedding, which an update of its weights would change; exclude it, "
            "or leave the weights as they are"
        )


def check_parameter(module: nn.Module, name: str, attribute: str = "weight") -> None:
    """Raise :class:`ConfigError` unless a layer's weight is a parameter of its own."""
    weight = module._parameters.get(attribute)
    if weight is None:
        raise ConfigError(
            f"layer {name!r}: its {attribute} is computed from other tensors, as by torch.nn.utils.prune, weight_norm, "
            "spectral_norm and parametrize; make it a parameter again (prune.remove, remove_weight_norm, "
            "remove_spectral_norm, remove_parametrizations), or exclude the layer"
        )
    if is_lazy(weight):
        raise ConfigError(f"layer {name!r} is lazy: it has no weight before the model has run once")
