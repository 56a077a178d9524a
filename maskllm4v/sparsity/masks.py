"""Masks as modules: a fixed one, or one that is learned.

A mask belongs to one parameter, which stays dense and where it is. Whoever reads that parameter as an attribute of its
module gets :meth:`Mask.read` of it (:mod:`maskllm4v.sparsity.layers`). Where a mask is missing that is an error, never
a dense weight.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.layout import Layout, from_rows, to_rows
from maskllm4v.sparsity.parameterization import gate_of, logits_dtype
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.reading import LastRead, in_backward, product_dtype, traced
from maskllm4v.utils.errors import CheckpointError, ConfigError, PatternError
from maskllm4v.utils.rng import generator, philox_key

if TYPE_CHECKING:
    from maskllm4v.sparsity.joined import JoinedDraw


class Mask(nn.Module):
    """The mask of one parameter.

    Args:
        weight: the parameter; it is looked at, not kept.
        pattern: N:M.
        name: of the parameter in its model: the layer's, if it is a layer's weight; for messages, and part of the
            noise's key.
        layout: how the parameter holds its rows (:mod:`maskllm4v.sparsity.layout`).

    Attributes:
        shape: of the weight as rows, ``[..., out, in]``: groups lie along the last dimension.
        dense_mode: whether readers get the dense weight; see :func:`maskllm4v.sparsity.surgery.as_dense`.
        on_read: called with the mask and what a reader gets; not in compiled code, nor in ``dense_mode``.
    """

    def __init__(self, weight: Tensor, pattern: NMPattern, name: str, layout: Layout) -> None:
        super().__init__()
        self.shape = to_rows(weight, layout).shape
        pattern.check_fits(self.shape[-1], name or "weight")
        self.pattern, self.name, self.layout = pattern, name, layout
        self.dense_mode = False
        self.sharing = False  # inside a forward of the model, see forwards
        self._last = LastRead()
        self.on_read: Callable[[Mask, Tensor], None] | None = None

    @abstractmethod
    def current_mask(self) -> Tensor:
        """The mask used at inference, boolean ``[..., out, in]``."""

    @abstractmethod
    def masked(self, weight: Tensor) -> Tensor:
        """The parameter under the mask, in the parameter's own layout; in training mode drawn, if it is learned."""

    def state(self) -> tuple[object, ...]:
        """What :meth:`masked` depends on besides the weight and the mode, as values that can be compared."""
        return ()

    def read(self, weight: Tensor) -> Tensor:
        """What a reader of the parameter gets. It is computed once for all readers where that is safe."""
        if self.dense_mode:
            return weight
        if torch.compiler.is_compiling():
            return self.masked(weight)
        try:
            value = self.masked(weight) if traced() else self._last.of(self, weight)
        except AttributeError as error:  # which nn.Module would answer with the dense parameter
            raise RuntimeError(f"the mask of {self.name!r} failed: {error}") from error
        if self.on_read is not None:
            self.on_read(self, value)
        return value

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is what a reader got last, or a slice of it."""
        return self._last.holds(tensor)

    def forget(self) -> None:
        """Compute the masked weight anew when it is read next.

        Raises:
            RuntimeError: what a reader got was written to, which changes no parameter.
        """
        self._last.forget(self.name)

    def train(self, mode: bool = True) -> Mask:
        self.forget()  # versions of tensors do not tell all: fused optimisers and .data leave them as they are
        return super().train(mode)

    def begin_forward(self) -> None:
        """The model's forward begins: until it ends, all readers get the same tensor."""
        self.sharing = True
        if self.training:
            self.forget()

    def end_forward(self) -> None:
        self.sharing = False
        self._last.end(self.name)

    def fold(self, weight: Tensor) -> Tensor:
        """The dense weight with zeros in the places that are pruned, a new tensor in the parameter's layout."""
        pruned = from_rows(~self.current_mask(), self.layout, weight.shape)
        return weight.detach().masked_fill(pruned, 0)  # a product would leave −0 where the weight is negative

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_last": LastRead(),
            "sharing": False,
            "on_read": None,
        }  # a graph may hang on what was read


class FixedMask(Mask):
    """A fixed boolean mask (Mishra et al., arXiv 2104.08378); arguments as of :class:`Mask`.

    A new one is empty: using it raises :class:`PatternError` until :meth:`set_mask` or a state dict fills it. Weights
    may be trained; masked ones get no gradient.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, pattern: NMPattern, name: str = "", layout: Layout = "rows") -> None:
        super().__init__(weight, pattern, name, layout)
        self.register_buffer("mask", None)

    def set_mask(self, mask: Tensor, device: torch.device) -> None:
        """Install a mask ``[..., out, in]`` after checking its shape and every group."""
        name = self.name or "weight"
        if mask.shape != self.shape:
            raise PatternError(f"layer {name!r}: mask {tuple(mask.shape)} for a weight {tuple(self.shape)}")
        self.pattern.validate(mask, name)
        self.mask = mask.to(device, torch.bool)
        self.forget()

    def current_mask(self) -> Tensor:
        if self.mask is None:
            raise PatternError(f"layer {self.name!r} has no mask yet: call set_mask, or load a checkpoint that has one")
        return self.mask

    def masked(self, weight: Tensor) -> Tensor:
        return weight * from_rows(self.current_mask(), self.layout, weight.shape)

    def state(self) -> tuple[object, ...]:
        mask = self.current_mask()
        return id(mask), mask._version

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        mask, name = state.get(f"{prefix}mask"), _owner(prefix)
        if mask is not None:
            if mask.shape != self.shape:
                raise CheckpointError(f"layer {name!r}: mask {tuple(mask.shape)} in the state dict")
            self.pattern.validate(mask, name)
            self.mask = torch.empty_like(mask if self.mask is None else self.mask, dtype=torch.bool)
        super()._load_from_state_dict(state, prefix, *args)
        if mask is None and self.mask is None and f"{prefix}mask" not in args[2]:
            args[2].append(f"{prefix}mask")  # missing_keys: strict loading must not pass over it
        self.forget()


def _owner(prefix: str) -> str:
    """The name of the parameter whose mask has that prefix in a state dict: ``fc1`` of ``fc1.weight_mask.``."""
    return prefix.removesuffix("_mask.").removesuffix(".weight")


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

    def state(self) -> tuple[object, ...]:
        logits = self.logits
        return id(logits), logits.data_ptr(), logits._version, self.hard, self.backend, id(self.joined)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnableMask:
        self.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept_energy": None, "joined": None}
