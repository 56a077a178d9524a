"""What pruning one layer gives."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """A boolean mask ``[out, in]`` and, if the method updated them, new weights (zero where pruned)."""

    mask: Tensor
    weight: Tensor | None = None
