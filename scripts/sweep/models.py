"""What the sweep runs: a model with random weights, inputs for it, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2


@dataclass(frozen=True)
class Subject:
    """One model of the sweep.

    Attributes:
        name: library, then family: ``"timm beit"``.
        make: builds it; whoever calls it has seeded torch's generator.
        inputs: makes what the model is called with, as keyword arguments if it is a dictionary.
        about: which model of the family it is.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    about: str = ""

    def model(self) -> nn.Module:
        """In evaluation mode, without dropout in any mode; nothing in it is zero or all alike."""
        torch.manual_seed(0)
        model = self.make()
        quiet_(model)
        redraw_(model)
        return model.eval()


def run(model: nn.Module, inputs: Any) -> Tensor:
    """All numbers that a model gives back, side by side in float32; of features and tuples, of each part."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return torch.cat([tensor.float().flatten() for tensor in numbers(output)])


def numbers(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model gives back, however it is nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for part in output for tensor in numbers(part)] if isinstance(output, list | tuple) else []


def quiet_(model: nn.Module) -> None:
    """Switch off what drops activations or whole blocks at random: then training has the outputs of evaluation, too."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_path", "dropout", "attn_drop_p", "attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@torch.no_grad()
def redraw_(model: nn.Module) -> None:
    """Make outputs depend on every layer: draw what an initialisation leaves at a constant, such as zero or 1e-5.

    Scales come to lie around 1, biases around 0. Matrices of zeros, the identity, and matrices much smaller than their
    fan-in asks for get the variance 1 / fan-in. Other weights stay.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.numel() == 0:
                continue
            low, high = parameter.aminmax()
            matrix = parameter.dim() > 1 and len(parameter) > 1
            wanted = (parameter.numel() / len(parameter)) ** -0.5 if matrix else 0.0
            if matrix and float(parameter.eq(0).float().mean()) > 0.5:
                parameter.normal_(0, wanted)
            elif low == high and (parameter.numel() > 1 or float(low) == 0):
                parameter.normal_(0 if float(low) == 0 and name != "weight" else 1, 0.1)
            elif matrix and (std := float(parameter.std())) < wanted / 2:
                parameter.mul_(wanted / std)
