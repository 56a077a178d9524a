"""Whether the weights in a file are N:M sparse: files of ours, anybody's state dict, an ONNX graph.

A weight ``[out, in]`` is, if each group of M consecutive values along the input axis, over which a product sums, has at
most N that are not zero; NaN is not zero. A mask keeps exactly N. A weight that is sparse along its other axis is not:
no kernel can use that.

What has to hold: the layers that a file of ours names, all masks, and what is asked for. Where nothing says which
layers were pruned, a weight without N:M counts as dense, and need not hold, if hardly any of it is zero; see
:func:`hardly_sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from maskllm4v.checkpoints.format import is_safetensors, kind_of, load_verified
from maskllm4v.checkpoints.masks import load_masks, load_plain_state
from maskllm4v.checkpoints.packed import load_packed_file
from maskllm4v.checkpoints.third_party import DEFAULT, LoadedWeights, load_any, read_torch
from maskllm4v.sparsity.layout import to_rows
from maskllm4v.sparsity.parameters import state_key
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError, ConfigError

HARDLY_A_ZERO = 0.9
FIRST_OF_GRAPH = b"\x08"  # the tag of an ONNX file's first field; no file of torch.save begins so


Verdict = Literal["holds", "violated", "dense"]
Axis = Literal["in", "out", "K", "N"]


@dataclass(frozen=True)
class LayerCheck:
    """What was found in one layer.

    Attributes:
        layer: its name, without ``.weight``.
        shape: as stored.
        pattern: that it was checked for.
        verdict: ``"dense"``: it does not hold, and need not.
        axis: along which it holds: ``"in"``, or ``"out"`` if only there, which is a violation; in an ONNX graph
            ``"K"`` and ``"N"``; None: along neither.
        density: share of the values that are not zero.
        required: whether it has to hold whatever its density.
        violation: the first group at fault along the input axis, counted from 0; None if it holds.
    """

    layer: str
    shape: tuple[int, ...]
    pattern: NMPattern
    verdict: Verdict
    axis: Axis | None
    density: float
    required: bool
    violation: str | None


@dataclass(frozen=True)
class Weight:
    """A weight or mask to check.

    Attributes:
        layer: its name, without ``.weight``.
        values: ``[out, in]``; of any type for weights.
        mask: whether it is a mask: exactly N of a group have to be one, the others zero.
        required: whether it has to hold whatever its density.
        node: of a graph: the node that multiplies by it, the first one of several; None elsewhere.
        k_axis: the input axis, along which groups lie.
    """

    layer: str
    values: Tensor
    mask: bool = False
    required: bool = False
    node: str | None = None
    k_axis: int = 1

    def matches(self, glob: str) -> bool:
        names = {self.layer, f"{self.layer}.weight", self.node or self.layer}
        return any(fnmatchcase(name, glob) for name in names)


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        weights: all that can be checked.
        pattern: that the file says; None if it says nothing.
        told: whether the file says which layers are sparse, so that the others need not be.
    """

    weights: Sequence[Weight]
    pattern: NMPattern | None = None
    told: bool = False


def verify_file(
    path: Path, pattern: NMPattern | None = None, *, layers: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerCheck]:
    """Check all layers of a file, in its order.

    Args:
        path: ours, any safetensors, ``.pt`` or ``.pth.tar`` file, or an ONNX graph; its content says which.
        pattern: to check for; None: what the file says, or 2:4.
        layers: patterns of names, as in shells, of layers that have to hold even if they look dense.
        exclude: likewise, of layers to leave out.

    Raises:
        CheckpointError: missing, damaged, tampered with, or no such file.
        ConfigError: a name matches no layer.
    """
    contents = read(path, pattern)
    for flag, globs in (("layers", layers), ("exclude", exclude)):
        for glob in globs:
            if not any(weight.matches(glob) for weight in contents.weights):
                raise ConfigError(f"{flag}: {glob!r} matches no weight of two dimensions in {path}")
    pattern = pattern or contents.pattern or DEFAULT
    chosen = [weight for weight in contents.weights if not any(map(weight.matches, exclude))]
    asked = [replace(w, required=True) if any(map(w.matches, layers)) else w for w in chosen]
    return [check_weight(weight, pattern, contents.told) for weight in asked]


def passes(checks: Sequence[LayerCheck]) -> bool:
    """Whether all that have to hold do, and there are any. Weights that are all zero hold, but prove nothing."""
    proven = any(check.verdict == "holds" and (check.required or check.density > 0) for check in checks)
    return proven and not any(check.verdict == "violated" for check in checks)


def check_weight(weight: Weight, pattern: NMPattern, told: bool = False) -> LayerCheck:
    """Check one weight; ``told``: one that is not required need not hold, however sparse it is.

    Raises:
        CheckpointError: its values are of a type that cannot be compared.
    """
    by_row = weight.values if weight.k_axis == 1 else weight.values.t()
    axes: tuple[Axis, Axis] = ("in", "out") if weight.node is None else ("K", "N")
    k, n = axes
    try:
        nonzero = by_row != 0
    except (NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"layer {weight.layer!r}: torch cannot find zeros among {by_row.dtype}") from error
    density = int(nonzero.count_nonzero()) / max(nonzero.numel(), 1)
    verdict: Verdict = "holds"
    axis: Axis | None = k
    violation = _fault(by_row, nonzero, pattern, weight.mask, "row" if weight.k_axis == 1 else "column")
    if violation is not None:
        verdict, axis = "violated", None
        if _fault(by_row.t(), nonzero.t(), pattern, weight.mask) is None:
            axis, violation = n, f"{violation}; holds along {n} instead of {k} (transposed?)"
        if not weight.required and (told or hardly_sparse(density, pattern)):
            verdict = "dense"
    shape = tuple(weight.values.shape)
    return LayerCheck(weight.layer, shape, pattern, verdict, axis, density, weight.required, violation)


def hardly_sparse(density: float, pattern: NMPattern) -> bool:
    """Whether a weight was hardly meant to be N:M: over 0.9 are not zero, and more are than half-way from N:M to all.

    High on purpose: who takes a broken layer for a dense one lets it pass.
    """
    return density > max(HARDLY_A_ZERO, (1 + pattern.n / pattern.m) / 2)


def _fault(values: Tensor, nonzero: Tensor, pattern: NMPattern, mask: bool, line: str = "") -> str | None:
    """What is wrong with a weight or mask whose groups lie in rows ``[lines, K]``: the first group, if it has any."""
    if nonzero.numel() == 0:
        return "it has no values"
    if not pattern.fits(width := nonzero.shape[1]):
        return f"its {width} input features are no multiple of {pattern.m}"
    if mask and bool((nonzero & (values != 1)).any()):
        return "a mask with values other than 0 and 1"
    counts = nonzero.reshape(-1, pattern.m).view(torch.uint8).sum(1, dtype=torch.uint8)
    faults = counts != pattern.n if mask else counts > pattern.n
    if not bool(faults.any()):
        return None
    first = int(faults.nonzero()[0])
    number, group = divmod(first, width // pattern.m)
    return f"{line} {number}, group {group}: {int(counts[first])} of {pattern.m} {'kept' if mask else 'non-zero'}"


def read(path: Path, pattern: NMPattern | None = None) -> Contents:
    """What a file holds; ``pattern``: of the logits in it, where they do not say.

    Raises:
        CheckpointError: as :func:`verify_file`.
    """
    if is_safetensors(path):
        return _safetensors(path, pattern)
    with path.open("rb") as stream:
        first = stream.read(1)
    if not first:
        raise CheckpointError(f"{path} is empty")
    if first == FIRST_OF_GRAPH or path.suffix.lower() == ".onnx":
        return _graph(path)
    return _state(path, read_torch(path)[0], pattern)


def _safetensors(path: Path, pattern: NMPattern | None) -> Contents:
    kind = kind_of(path)
    try:
        if kind == "masks":
            masks = load_masks(path)
            if masks.pattern is None:  # of a dense model that was trained on
                return Contents(_weights(masks.weights))
            found = [Weight(n, m.flatten(0, -2), mask=True, required=True) for n, m in masks.masks.items()]
            return Contents(found, masks.pattern)
        if kind == "packed":
            packed = load_packed_file(path)
            return _named(path, packed.tensors, packed.about, packed.pattern)
        if kind == "dense":
            tensors, about = load_verified(path, "dense")
            named = NMPattern(about["pattern"]) if about.get("pattern") else None
            return _named(path, tensors, about, named)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its header does not say what such a file has to") from error
    return _state(path, load_plain_state(path), pattern)


def _named(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], pattern: NMPattern | None) -> Contents:
    """A file that names its sparse layers, if there are any."""
    weights = {weight.layer: weight for weight in _weights(state)}
    layers: Sequence[str] = about.get("layers") or []
    stored: Mapping[str, Any] = about.get("stored", {})
    for layer in layers:
        key = state_key(layer, state)
        if key in state and (key == layer or layer in stored):  # not ``[out, in]``, or not called weight
            rows = to_rows(state[key], stored.get(layer, {}).get("layout", "rows"))
            weights[layer] = Weight(layer, rows.flatten(0, -2))
    if missing := [layer for layer in layers if layer not in weights]:
        raise CheckpointError(f"{path} is damaged: it names layer {missing[0]!r}, but has no weight of it")
    required = {layer: replace(weights[layer], required=True) for layer in layers}
    return Contents(list((weights | required).values()), pattern, told=bool(layers))


def _state(path: Path, state: Mapping[str, Tensor], pattern: NMPattern | None) -> Contents:
    """A state dict of others; a layer with a mask is what its mask says, since its weight may still be dense."""
    masks: dict[str, Tensor] = {}
    pattern_told: NMPattern | None = None
    if _beside(state, ".gate"):
        options = any(name.endswith(".mask_options") for name in state)
        found = load_any(path, pattern=None if options else pattern)
        assert isinstance(found, LoadedWeights)
        masks, pattern_told, state = dict(found.masks), found.pattern, found.weights
    else:
        for layer in _beside(state, ".mask"):
            masks[layer], weight = state[f"{layer}.mask"], state[f"{layer}.weight"]
            if masks[layer].shape != weight.shape:
                raise CheckpointError(f"{path}: layer {layer!r} has a mask of another shape than its weight")
        for name in state:  # of a masked model of ours: beside any parameter, as rows
            if name.endswith("_mask.mask"):
                masks[name.removesuffix("_mask.mask").removesuffix(".weight")] = state[name].flatten(0, -2)
    weights = {weight.layer: weight for weight in _weights(state)}
    checked = weights | {layer: Weight(layer, mask, mask=True, required=True) for layer, mask in masks.items()}
    return Contents(list(checked.values()), pattern_told, told=bool(masks))


def _beside(state: Mapping[str, Tensor], kind: str) -> list[str]:
    """The layers that have such a tensor next to a weight ``[out, in]``."""
    layers = [name.removesuffix(kind) for name in state if name.endswith(kind)]
    return [layer for layer in layers if f"{layer}.weight" in state and state[f"{layer}.weight"].ndim == 2]


def _weights(state: Mapping[str, Tensor]) -> list[Weight]:
    """All weights of two dimensions: also tables of embeddings, which nobody can tell from a linear layer's."""
    found = {name: tensor for name, tensor in state.items() if name.endswith("weight") and tensor.ndim == 2}
    plain = {name: t if t.layout is torch.strided else t.to_dense() for name, t in found.items()}
    return [Weight(name.removesuffix(".weight"), tensor) for name, tensor in plain.items()]


def _graph(path: Path) -> Contents:
    """A graph; of ours, the weights of the layers that were masked are called after them, and have to hold."""
    from maskllm4v.export.onnx import about_graph, graph_weights

    about = about_graph(path)
    masked = set((about.get("weights") or {}).values())
    found: dict[tuple[str, int], Weight] = {}
    for w in graph_weights(path):
        if w.array.ndim == 2:  # a matrix that nodes share is checked once for each axis
            layer = w.layer or w.name.removesuffix(".weight")
            nonzero = torch.from_numpy(np.asarray(w.array != 0))  # torch lacks some of NumPy's types
            found.setdefault((w.name, w.k_axis), Weight(layer, nonzero, False, w.name in masked, w.node, w.k_axis))
    if missing := masked - {name for name, _ in found}:
        raise CheckpointError(f"{path} is damaged: no node multiplies by {min(missing)!r}, which it names")
    pattern = NMPattern(about["pattern"]) if about.get("pattern") else None
    return Contents(list(found.values()), pattern, told=bool(masked))
