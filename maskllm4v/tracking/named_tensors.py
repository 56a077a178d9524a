"""Lets ``mlflow.pyfunc`` call exported models of several inputs or outputs; MLflow's own loader knows one only.

A copy of this file lies in each such model and is all that it needs of us: it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class NamedTensors:
    """A model whose inputs are named, and its outputs where there are several.

    Args:
        module: takes tensors by position; gives a tensor, or several: a tuple of them, or a dict by name.
        inputs: names, in that order.
        outputs: names, in the order of the tuple.
    """

    def __init__(self, module: Any, inputs: list[str], outputs: list[str]) -> None:
        self.module, self.inputs, self.outputs = module, inputs, outputs

    def predict(
        self, data: dict[str, np.ndarray], params: dict[str, Any] | None = None
    ) -> np.ndarray | dict[str, np.ndarray]:
        """The output for arrays by name, the first dimension of each being the batch; several outputs by name."""
        import torch

        with torch.no_grad():
            found = self.module(*(torch.from_numpy(data[name]) for name in self.inputs))
        if isinstance(found, torch.Tensor):
            output: np.ndarray = found.numpy()
            return output
        named = found if isinstance(found, Mapping) else dict(zip(self.outputs, found, strict=True))
        return {name: named[name].numpy() for name in self.outputs}


def _load_pyfunc(path: str) -> NamedTensors:
    """What MLflow calls with the folder of the model's data."""
    from mlflow.models import Model
    from mlflow.pytorch import load_model

    folder = Path(path).parent
    signature = Model.load(str(folder)).signature
    outputs = signature.outputs.input_names() if signature.outputs.has_input_names() else []
    return NamedTensors(load_model(str(folder)), signature.inputs.input_names(), outputs)
