"""Sums over a layer's inputs that one-shot pruning needs, in float32 whatever the process allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from maskllm4v.utils.distributed import sum_
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.text import few


class Statistic(Protocol):
    """Something summed over a layer's inputs; one of :class:`Sums` is looked at before it is used."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    def update(self, rows: Tensor) -> None:
        """Take in float32 rows ``[tokens, in]``."""

    def combine(self) -> None:
        """Add up what all processes have taken in."""


@runtime_checkable
class Sums(Protocol):
    """A statistic that says whether it can be used.

    Attributes:
        rows: how many it has taken in.
    """

    @property
    def rows(self) -> int: ...

    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""


def checked(statistics: dict[str, Any]) -> dict[str, Any]:
    """The statistics of some layers, as they are, if something was summed up and all sums are finite.

    Of a layer with several blocks, whose statistics are a list, some may have seen nothing: experts without a token.

    Raises:
        DataError: otherwise; names all layers that saw nothing, or the first one whose sums are not finite.
    """
    blocks = {name: one if isinstance(one, list) else [one] for name, one in statistics.items()}
    sums = {name: found for name, parts in blocks.items() if (found := [p for p in parts if isinstance(p, Sums)])}
    if idle := [name for name, parts in sums.items() if not any(part.rows for part in parts)]:
        raise DataError(
            f"calibration: {few(idle, 'layer')} saw no input: batches are empty, or no token comes there; "
            "show more batches or leave such layers dense with `exclude`"
        )
    for name, parts in sums.items():
        if not all(part.is_finite() for part in parts):
            raise DataError(
                f"layer {name!r}: calibration gave inputs that are not finite, or too large for sums in float32"
            )
    return statistics


class InputNorm:
    """‖x_j‖² of each input feature, ``[in]``, float32 (Wanda)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_of_squares = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        self.sum_of_squares += rows.square().sum(0)
        self.rows += rows.shape[0]

    def combine(self) -> None:
        rows = torch.tensor(self.rows, device=self.sum_of_squares.device)
        sum_(self.sum_of_squares, rows)
        self.rows = int(rows)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sum_of_squares).all())


SET_ONE_BY_ONE = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since torch 2.9
WIDE = 512  # from this width on, half of a symmetric product is worth several smaller calls
STRIP = 256


class Hessian:
    """Σ x xᵀ over all input rows, ``[in, in]``, float32 (SparseGPT; half the Hessian of the layer's error).

    Read :attr:`mean`: what counts in ``sum_of_products`` is the diagonal and what is above it. Libraries may round the
    two halves of a product differently, and of a wide layer on a CPU only strips of rows from the diagonal on are
    computed, half the work; a GPU needs the whole product at once to be busy.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_of_products = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.rows = 0
        height = STRIP if in_features >= WIDE and device.type == "cpu" else in_features
        self._strips = [(start, min(start + height, in_features)) for start in range(0, in_features, height)]

    def update(self, rows: Tensor) -> None:
        with full_float32(rows.device):
            for start, stop in self._strips:
                self.sum_of_products[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])
        self.rows += rows.shape[0]

    def combine(self) -> None:
        rows = torch.tensor(self.rows, device=self.sum_of_products.device)
        sum_(self.sum_of_products, rows)
        self.rows = int(rows)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sum_of_products.diagonal()).all())  # |Σ ab|² ≤ Σ a² · Σ b²

    @property
    def mean(self) -> Tensor:
        """H = 2/n · Σ x xᵀ, symmetric to the bit, a new tensor."""
        mean = self.sum_of_products * (2 / self.rows)
        for start, stop in self._strips:
            corner = mean[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).t())
            mean[stop:, start:stop] = mean[start:stop, stop:].t()
        return mean


class CrossCovariance:
    """A layer's Hessian, and Σ x′ xᵀ ``[in, in]`` of its inputs x′ and those of its twin in another network, x.

    Attributes:
        hessian: of x′.
        sum_of_crosses: float32; rows belong to x′.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.hessian = Hessian(in_features, device)
        self.sum_of_crosses = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    @property
    def rows(self) -> int:
        return self.hessian.rows

    def update(self, rows: Tensor, twins: Tensor) -> None:
        """Take in float32 rows ``[tokens, in]`` of both, token by token the same."""
        self.hessian.update(rows)
        with full_float32(rows.device):
            self.sum_of_crosses.addmm_(rows.t(), twins)

    def combine(self) -> None:
        self.hessian.combine()
        sum_(self.sum_of_crosses)

    def is_finite(self) -> bool:
        return self.hessian.is_finite() and bool(torch.isfinite(self.sum_of_crosses).all())

    @property
    def mean(self) -> Tensor:
        """2/n · Σ x′ xᵀ, a new tensor."""
        return self.sum_of_crosses * (2 / self.hessian.rows)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 are summed in float32, even where TF32, bfloat16 or autocast is allowed.

    Settings of the whole process change for the time being, and only if they allow less than float32.
    """
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, which this function refuses to sum up
        allowed = ""
    with torch.autocast(device.type, enabled=False):
        if allowed == "highest":
            yield
            return
        backends = torch.backends
        single = [backends.cuda.matmul, backends.mkldnn.matmul] if SET_ONE_BY_ONE else []  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in single]
        try:
            if allowed:
                torch.set_float32_matmul_precision("highest")
            else:
                for backend in single:
                    backend.fp32_precision = "ieee"
            yield
        finally:
            if allowed:
                torch.set_float32_matmul_precision(allowed)
            for backend, precision in zip(single, before, strict=True):
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision
