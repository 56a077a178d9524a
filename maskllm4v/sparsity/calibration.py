"""Batches that show a model's layers their inputs, for one-shot methods and whoever provides such batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maskllm4v.utils.errors import ConfigError, DataError
from maskllm4v.utils.text import few, one_line

if TYPE_CHECKING:
    from maskllm4v.sparsity.parameters import Matrix

Forward = Callable[[nn.Module, Any], Any]
Tokens = Callable[[str, torch.Size, Any], Tensor | None]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(x)`` for a tensor, ``model(batch[0])`` for an (inputs, labels) pair, ``model(**batch)`` for a dict.

    Raises:
        DataError: the model takes no such input, for example one of another width.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, tuple | list) else batch)
    except (RuntimeError, AssertionError) as error:  # PyTorch's of shapes; timm's of images' sizes
        if type(error) not in (RuntimeError, AssertionError):  # out of memory, not implemented
            raise
        raise DataError(f"calibration: the model cannot take a batch: {one_line(error)[:300]}") from error


def check_materialised(layers: Mapping[str, Matrix]) -> None:
    """Raise :class:`ConfigError`, naming layers, where weights have no values yet (device ``meta``)."""
    if empty := [name for name, layer in layers.items() if layer.weight.is_meta]:
        raise ConfigError(
            f"{few(empty, 'layer')}: on device 'meta', without values; first load the model's weights (to_empty and "
            "load_state_dict, or load_state_dict with assign=True)"
        )


@contextmanager
def hooks_run() -> Iterator[None]:
    """Inside, what ``torch.compile`` has compiled runs as plain PyTorch, whose hooks and products can be watched."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True)
class Calibration:
    """Batches that show layers their inputs, and the layers that see them.

    Several of them are the parts of one calibration. A layer belongs to the first part that names it; its inputs may
    depend on the layers of its own part and of parts before that, never on those of later ones.

    Attributes:
        batches: iterated over once at most. Where a layer's inputs depend on other layers, all are held meanwhile: in
            main memory, if they lie there and ``forward`` moves each to the model's device.
        forward: how to run the model on a batch; it may run a piece of it.
        layers: name patterns as in shells.
        independent: no layer's input depends on another layer's output, so that one pass shows all of them.
        tokens: which tokens count, where some are padding: given a layer's name, the shape of its inputs without their
            last dimension, and the batch, it gives a boolean mask of that shape, or None: all of them. Inputs of an
            expert are only the tokens that came there. By default all tokens of all layers count.
        paired: whether a token of the dense network is the same one in the pruned network. The queries that a detector
            picks from its image's tokens are not, though there are as many: with False, nothing compares these layers'
            inputs in both networks. Such layers and others can be two parts with the same batches.
    """

    batches: Iterable[Any]
    forward: Forward = default_forward
    layers: tuple[str, ...] = ("*",)
    independent: bool = False
    tokens: Tokens | None = None
    paired: bool = True


def counting_tokens(tokens: Tokens | None, name: str, inputs: Tensor, batch: Any) -> Tensor | None:
    """Which of a layer's inputs ``[..., in]`` count, boolean ``[...]``; None: all. See :attr:`Calibration.tokens`.

    Raises:
        ConfigError: ``tokens`` gives something else; names the layer.
    """
    counting = None if tokens is None else tokens(name, inputs.shape[:-1], batch)
    if counting is None:
        return None
    if counting.dtype != torch.bool or counting.shape != inputs.shape[:-1]:
        raise ConfigError(
            f"calibration: tokens gives {counting.dtype} {tuple(counting.shape)} for layer {name!r}, whose inputs are "
            f"{tuple(inputs.shape)}; allowed: torch.bool {tuple(inputs.shape[:-1])}, or None"
        )
    return counting.to(inputs.device)


def as_parts(calibration: Iterable[Any] | Tensor | Calibration, forward: Forward | None) -> Sequence[Calibration]:
    """The parts of a calibration that may also be an input tensor or batches, which ``forward`` runs.

    Raises:
        ConfigError: nothing of all that; parts among batches, or a ``forward`` beside parts, which have their own.
    """
    if not isinstance(calibration, Calibration | Iterable):
        raise ConfigError(f"calibration is {calibration!r}; allowed: an input tensor, batches, parts")
    if isinstance(calibration, Calibration):
        calibration = [calibration]
    if isinstance(calibration, list | tuple) and any(isinstance(part, Calibration) for part in calibration):
        if not all(isinstance(part, Calibration) for part in calibration):
            raise ConfigError("calibration holds both parts and batches; wrap the batches in a Calibration")
        if forward is not None:
            raise ConfigError("forward is given, but each part of the calibration has its own")
        return calibration
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    return [Calibration(batches, forward or default_forward)]


def names_by_part(names: Iterable[str], parts: Sequence[Calibration]) -> list[list[str]]:
    """Which layers belong to each part, in the order given.

    Raises:
        ConfigError: a layer that no part names.
        DataError: no parts.
    """
    if not parts:
        raise DataError("calibration: no batches given")
    found: list[list[str]] = [[] for _ in parts]
    for name in names:
        for part, own in zip(parts, found, strict=True):
            if any(fnmatchcase(name, pattern) for pattern in part.layers):
                own.append(name)
                break
        else:
            raise ConfigError(
                f"calibration: no part names layer {name!r}; add it to one, or leave it dense with `exclude`"
            )
    return found
