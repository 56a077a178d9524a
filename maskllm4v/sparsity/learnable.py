"""Masks that are learned, and the noise that they are drawn with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.layout import Layout, from_rows, to_rows
from maskllm4v.sparsity.masks import Mask
from maskllm4v.sparsity.parameterization import gate_of, logits_dtype
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.reading import in_backward, product_dtype
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import generator, philox_key

if TYPE_CHECKING:
    from maskllm4v.sparsity.joined import JoinedDraw


@dataclass(frozen=True)
class NoiseKey:
    """Which noise a learnable mask gets: all that its Gumbel draws depend on, next to the layer's name.

    Attributes:
        seed: of the run.
        step, micro_step: of training, and within a step that accumulates gradients; from 0.
        rank: of the process.
    """

    seed: int = 0
    step: int = 0
    micro_step: int = 0
    rank: int = 0


class LearnableMask(Mask):
    """A mask that is learned, on a frozen parameter (MaskLLM, arXiv 2409.17481).

    In training mode a soft mask is drawn from ``logits``; in evaluation mode the arg-max mask is used. ``logits``
    ``[K, groups]`` is the parameter, in float32 at least, groups in the order of the weight's rows.

    Args:
        weight, pattern, name, layout: as of :class:`Mask`.
        gate: what logits stand for (:mod:`maskllm4v.sparsity.parameterization`): ``"candidates"``, K = C(M, N), or
            ``"positions"``, K = M.
        hard: straight-through: arg-max forward, soft gradient backward.
        tau: temperature τ.
        scaling: factor s on the logits.
        gate_std: standard deviation σ of the initial logits.
        seed: seed of the initial logits and of the noise.

    Attributes:
        kept_energy: Σ(masked weight)² of the last draw, for the sparse-weight regulariser; None while it is ``joined``.
        joined: what draws it together with others (:mod:`maskllm4v.sparsity.joined`), if anything.
        backend: of the mask operation, one of :data:`maskllm4v.sparsity.gumbel.BACKENDS`.
        draw: the noise used next. Reading a weight does not move it on. Training loops set it
            (:func:`~maskllm4v.sparsity.surgery.set_noise_key`); where nobody does (``auto_advance``), each training
            forward of the model moves on to the next step by itself.

    Raises:
        PatternError: the pattern is none, or does not divide the weight's inputs.
        ConfigError: ``gate`` is unknown, or ``gate_std`` is negative or no number.
        ValueError: ``tau`` or ``scaling`` is not a positive number.
    """

    candidates: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        pattern: NMPattern,
        name: str = "",
        layout: Layout = "rows",
        *,
        gate: str = "candidates",
        hard: bool = False,
        tau: float = 1.0,
        scaling: float = 100.0,
        gate_std: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(weight, pattern, name, layout)
        self.gate = gate_of(gate, self.pattern)
        if not (math.isfinite(gate_std) and gate_std >= 0):
            raise ConfigError(f"gate_std is {gate_std}; allowed: 0 or more")
        self.hard, self.tau, self.scaling, self.gate_std = hard, tau, scaling, gate_std
        self.draw = NoiseKey(seed)
        self.backend = "auto"
        self.kept_energy: Tensor | None = None
        self.auto_advance = True  # by itself, until set_noise_key takes over
        self.joined: JoinedDraw | None = None
        shape = (self.gate.logits, weight.numel() // self.pattern.m)
        self.logits = nn.Parameter(torch.zeros(shape, dtype=logits_dtype(weight), device=weight.device))
        candidates = self.gate.candidates(weight.device, weight.dtype)  # no copy a step
        self.register_buffer("candidates", candidates, persistent=False)
        if self.gate_std and not weight.is_meta:
            noise = generator(seed, "logits", self.name).standard_normal(shape, dtype="float32")
            self.logits.data.copy_(torch.from_numpy(noise)).mul_(self.gate_std)

    # What moves while training is kept in small tensors on the CPU: a compiled graph takes them as inputs, so new
    # values compile nothing again, and reading them waits for no device. They are replaced, never written to:
    # autograd may still hold the old ones.

    @property
    def tau(self) -> float:
        return float(self._tau)

    @tau.setter
    def tau(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"tau is {value}; a temperature is > 0 and finite")
        self._tau = torch.tensor(value, dtype=torch.float64, device="cpu")
        self.forget()

    @property
    def scaling(self) -> float:
        return float(self._scaling)

    @scaling.setter
    def scaling(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"scaling is {value}; it has to be > 0 and finite")
        self._scaling = torch.tensor(value, dtype=torch.float64, device="cpu")
        self.forget()

    @property
    def draw(self) -> NoiseKey:
        return self._draw

    @draw.setter
    def draw(self, value: NoiseKey) -> None:
        self._draw = value
        key = philox_key(value.seed, "gumbel", self.name, value.step, value.micro_step, value.rank)
        self._key = torch.from_numpy(key.view("int64"))
        self.forget()

    def masked_weight(
        self, weight: Tensor, uniform: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample a mask and apply it.

        Args:
            weight: dense, in the parameter's layout.
            uniform: noise in (0, 1), ``[K, groups]``; by default drawn as :attr:`draw` says.
            dtype: of the masked weight; by default the weight's.

        Returns:
            The masked weight, in the parameter's layout, and the sum of its squares (scalar).
        """
        masked, energy = masked_weight(
            to_rows(weight, self.layout),
            self.logits,
            self.candidates,
            tau=self._tau,
            scaling=self._scaling,
            hard=self.hard,
            uniform=uniform,
            key=self._key if uniform is None else None,
            kept=self.gate.kept,
            dtype=dtype,
            backend=self.backend,
        )
        return from_rows(masked, self.layout, weight.shape), energy

    def current_mask(self) -> Tensor:
        """The most probable mask of each group, boolean ``[..., out, in]``."""
        return self.gate.mask(self.logits.detach(), self.candidates).reshape(self.shape)

    def masked(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight * from_rows(self.current_mask(), self.layout, weight.shape)
        dtype = product_dtype(weight)
        found = None if self.joined is None else self.joined.take(self, dtype)
        if found is not None:
            return from_rows(found, self.layout, weight.shape)
        masked, energy = self.masked_weight(weight, dtype=dtype)
        self.kept_energy = energy if self.joined is None else None
        return masked

    def sources(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight, self.logits

    def state(self) -> tuple[object, ...]:
        return self.hard, self.backend

    def read(self, weight: Tensor) -> Tensor:
        if self.training and self.auto_advance and not self.dense_mode and in_backward():
            raise RuntimeError("activation checkpointing needs set_noise_key: a layer would draw anew when recomputed")
        return super().read(weight)

    def end_forward(self) -> None:
        super().end_forward()
        if self.auto_advance and self.training and not self.dense_mode:
            self.draw = NoiseKey(self.draw.seed, self.draw.step + 1)

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}, logits={len(self.logits)}, hard={self.hard}"

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept_energy": None, "joined": None}
