"""Lets ``mlflow.pyfunc`` call exported models of several inputs; MLflow's own loader knows one only.

A copy of this file lies in each such model and is all that it needs of us: it imports nothing of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class SeveralInputs:
    """A model whose inputs are named.

    Args:
        module: takes tensors by position.
        names: theirs, in that order.
    """

    def __init__(self, module: Any, names: list[str]) -> None:
        self.module, self.names = module, names

    def predict(self, data: dict[str, np.ndarray], params: dict[str, Any] | None = None) -> np.ndarray:
        """The output for arrays by name, the first dimension of each being the batch."""
        import torch

        with torch.no_grad():
            output: np.ndarray = self.module(*(torch.from_numpy(data[name]) for name in self.names)).numpy()
        return output


def _load_pyfunc(path: str) -> SeveralInputs:
    """What MLflow calls with the folder of the model's data."""
    from mlflow.models import Model
    from mlflow.pytorch import load_model

    folder = Path(path).parent
    return SeveralInputs(load_model(str(folder)), Model.load(str(folder)).signature.inputs.input_names())
