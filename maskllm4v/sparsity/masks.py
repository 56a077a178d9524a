"""Linear layers under an N:M mask: a fixed one, or one that is learned.

Both keep the dense weight and its bias as they are and apply the mask on the way, so that a mask can
always be changed, compared or folded away (:meth:`fold`). A missing mask is an error, never a dense layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.parameterization import gate_of, logits_dtype
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError, PatternError
from maskllm4v.utils.rng import generator, philox_key

if TYPE_CHECKING:
    from maskllm4v.sparsity.joined import JoinedDraw


def _new_like(cls: type[nn.Linear], linear: nn.Linear, **kwargs: Any) -> Any:
    """A layer of ``cls`` that shares the parameters of ``linear``; nothing is drawn or copied."""
    with torch.device("meta"):
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, **kwargs)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)


def unmasked(layer: nn.Linear) -> nn.Linear:
    """A plain ``nn.Linear`` that shares a layer's parameters; its mask, if any, is left off."""
    linear: nn.Linear = _new_like(nn.Linear, layer)
    return linear


def _folded(layer: nn.Linear, mask: Tensor) -> nn.Linear:
    linear = unmasked(layer)
    weight = layer.weight.detach().masked_fill(~mask, 0)  # a product would leave −0 where the weight is negative
    linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    return linear


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What a matrix product will read the weight as: under autocast it is written so at once."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


class MaskedLinear(nn.Linear):
    """``y = x (w ⊙ mask)ᵀ + b`` with a fixed boolean N:M mask ``[out, in]`` (Mishra et al., arXiv 2104.08378).

    Inputs are ``[..., in_features]``, outputs ``[..., out_features]``.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        N, M: the pattern that the mask has to satisfy.

    A new layer has no mask; using it raises :class:`PatternError` until :meth:`set_mask` or a state dict
    brings one. Weights may be trained; masked ones get no gradient.
    """

    mask: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, N: int = 2, M: int = 4) -> None:
        super().__init__(in_features, out_features, bias)
        self.pattern = NMPattern(N, M)
        self.pattern.check_fits(in_features)
        self.register_buffer("mask", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, N: int = 2, M: int = 4) -> MaskedLinear:
        """Take over a layer's parameters; the mask is still missing."""
        layer: MaskedLinear = _new_like(cls, linear, N=N, M=M)
        return layer

    def set_mask(self, mask: Tensor, layer: str = "weight") -> None:
        """Install a mask ``[out, in]`` after checking its shape and every group."""
        if mask.shape != self.weight.shape:
            raise PatternError(f"layer {layer!r}: mask {tuple(mask.shape)} for a weight {tuple(self.weight.shape)}")
        self.pattern.validate(mask, layer)
        self.mask = mask.to(self.weight.device, torch.bool)

    def current_mask(self) -> Tensor:
        """The mask in use, boolean ``[out, in]``."""
        if self.mask is None:
            raise PatternError("a MaskedLinear has no mask yet: call set_mask, or load a checkpoint that has one")
        return self.mask

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.current_mask(), self.bias)

    def fold(self) -> nn.Linear:
        """A plain ``nn.Linear`` whose pruned weights are zero."""
        return _folded(self, self.current_mask())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        mask = state.get(f"{prefix}mask")
        if mask is not None:
            if mask.shape != self.weight.shape:
                raise CheckpointError(f"layer {prefix[:-1]!r}: mask {tuple(mask.shape)} in the state dict")
            self.pattern.validate(mask, prefix[:-1])
            self.mask = torch.empty_like(self.weight, dtype=torch.bool)
        super()._load_from_state_dict(state, prefix, *args)
        if mask is None and self.mask is None and f"{prefix}mask" not in args[2]:
            args[2].append(f"{prefix}mask")  # missing_keys: strict loading must not pass over it


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


class LearnableMaskedLinear(nn.Linear):
    """A frozen linear layer whose N:M mask is learned (MaskLLM, arXiv 2409.17481).

    Inputs are ``[..., in_features]``, outputs ``[..., out_features]``.
    In training mode each forward samples a soft mask from ``logits``; in evaluation mode the arg-max
    mask is used. Weight and bias are frozen; ``logits`` ``[K, groups]`` is the parameter, in
    float32 at least.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        N, M: the pattern.
        gate: what logits stand for (:mod:`maskllm4v.sparsity.parameterization`): ``"candidates"``, K = C(M, N), or
            ``"positions"``, K = M.
        hard: straight-through: arg-max forward, soft gradient backward.
        tau: temperature τ.
        scaling: factor s on the logits.
        gate_std: standard deviation σ of the initial logits.
        name: the layer's name in its model, part of the noise's key.
        seed: seed of the initial logits and of the noise.

    Attributes:
        kept_energy: Σ(masked weight)² of the last training forward, for the sparse-weight regulariser; None while the
            layer is ``joined``.
        joined: what draws its masks together with other layers' (:mod:`maskllm4v.sparsity.joined`), if anything.
        backend: of the mask operation, one of :data:`maskllm4v.sparsity.gumbel.BACKENDS`.
        draw: the noise used next. Training loops set it (:func:`~maskllm4v.sparsity.surgery.set_noise_key`); where
            nobody does, each training forward moves on to the next step by itself.

    Raises:
        PatternError: the pattern is none, or does not divide ``in_features``.
        ConfigError: ``gate`` is unknown.
        ValueError: ``tau`` or ``scaling`` is not a positive number.
    """

    candidates: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        N: int = 2,
        M: int = 4,
        gate: str = "candidates",
        hard: bool = False,
        tau: float = 1.0,
        scaling: float = 100.0,
        gate_std: float = 0.2,
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.pattern = NMPattern(N, M)
        self.pattern.check_fits(in_features, name or "weight")
        self.gate = gate_of(gate, self.pattern)
        self.hard, self.tau, self.scaling, self.gate_std = hard, tau, scaling, gate_std
        self.name = name
        self.draw = NoiseKey(seed)
        self.backend = "auto"
        self.kept_energy: Tensor | None = None
        self.auto_advance = True  # by itself, until set_noise_key takes over
        self.dense_mode = False  # see as_dense
        self.joined: JoinedDraw | None = None
        self._freeze_and_add_logits()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> LearnableMaskedLinear:
        """Take over and freeze a layer's parameters; keyword arguments as in the constructor."""
        layer: LearnableMaskedLinear = _new_like(cls, linear, **kwargs)
        layer._freeze_and_add_logits()
        return layer

    def _freeze_and_add_logits(self) -> None:
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        shape = (self.gate.logits, self.weight.numel() // self.pattern.m)
        dtype = logits_dtype(self.weight)
        self.logits = nn.Parameter(torch.zeros(shape, dtype=dtype, device=self.weight.device))
        candidates = self.gate.candidates(self.weight.device, self.weight.dtype)  # no copy a step
        self.register_buffer("candidates", candidates, persistent=False)
        if self.gate_std and not self.weight.is_meta:
            noise = generator(self.draw.seed, "logits", self.name).standard_normal(shape, dtype="float32")
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

    @property
    def scaling(self) -> float:
        return float(self._scaling)

    @scaling.setter
    def scaling(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"scaling is {value}; it has to be > 0 and finite")
        self._scaling = torch.tensor(value, dtype=torch.float64, device="cpu")

    @property
    def draw(self) -> NoiseKey:
        return self._draw

    @draw.setter
    def draw(self, value: NoiseKey) -> None:
        self._draw = value
        key = philox_key(value.seed, "gumbel", self.name, value.step, value.micro_step, value.rank)
        self._key = torch.from_numpy(key.view("int64"))

    def masked_weight(
        self, uniform: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample a mask and apply it.

        Args:
            uniform: noise in (0, 1), ``[K, groups]``; by default drawn as :attr:`draw` says.
            dtype: of the masked weight; by default the weight's.

        Returns:
            The masked weight ``[out, in]`` and the sum of its squares (scalar).
        """
        return masked_weight(
            self.weight,
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

    def current_mask(self) -> Tensor:
        """The most probable mask of each group, boolean ``[out, in]``."""
        return self.gate.mask(self.logits.detach(), self.candidates).reshape(self.weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        if self.dense_mode:
            return F.linear(input, self.weight, self.bias)
        if not self.training:
            return F.linear(input, self.weight * self.current_mask(), self.bias)
        dtype = _product_dtype(self.weight)
        weight = None if self.joined is None else self.joined.take(self, dtype)
        if weight is None:
            weight, energy = self.masked_weight(dtype=dtype)
            self.kept_energy = energy if self.joined is None else None
        if self.auto_advance:
            self._advance()
        return F.linear(input, weight, self.bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _advance(self) -> None:
        if torch._C._current_graph_task_id() != -1:  # within backward, where checkpointing repeats this forward
            raise RuntimeError("activation checkpointing needs set_noise_key: a layer would draw anew when recomputed")
        self.draw = NoiseKey(self.draw.seed, self.draw.step + 1)

    def fold(self) -> nn.Linear:
        """A plain ``nn.Linear`` whose pruned weights are zero."""
        return _folded(self, self.current_mask())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}, logits={len(self.logits)}, hard={self.hard}"
