"""How a step is computed: in which precision, in how much memory, compiled or not, by how many processes.

All of it is PyTorch's own: ``torch.autocast``, ``GradScaler``, ``DistributedDataParallel``, ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskllm4v.config import TrainingSettings
from maskllm4v.utils.distributed import join
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.processes import world_size

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """Forward and backward passes, clipping and the optimiser's step of one run.

    Args:
        model: on its device; wrapped by :meth:`wrapped`, never patched.
        tensors: those of its parameters that are trained.
        optimizer: of these.
        settings: ``amp``, ``channels_last``, ``grad_checkpointing``, ``compile`` and ``clip_grad``.

    Attributes:
        device: where the model is.
        scaler: of the loss, in fp16; in other precisions it does nothing.

    Raises:
        ConfigError: the device does not compute in this precision.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
    ) -> None:
        self._model, self._tensors, self._optimizer, self._settings = model, tensors, optimizer, settings
        self.device = tensors[0].device
        check_precision(settings.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        join(self.device)

    @contextmanager
    def wrapped(self) -> Iterator[nn.Module]:
        """The model to call instead: its outputs are float32, and its gradients are averaged over processes.

        Afterwards the model is what it was, but for the memory format of its parameters.

        Raises:
            ConfigError: ``grad_checkpointing`` is on, and the model cannot do it.
        """
        settings, model = self._settings, self._model
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        if settings.grad_checkpointing:
            _checkpoint_activations(model, on=True)
        try:
            # torch.compile sets an attribute on what it is given: not on the caller's model.
            wrapped: Any = torch.compile(_Around(model)) if settings.compile else model
            wrapped = mixed_precision(wrapped, self.device, settings.amp)
            if world_size() > 1:
                # Each trained tensor has to get a gradient: otherwise the next forward pass raises, on all processes.
                devices = [self.device] if self.device.type == "cuda" else None
                wrapped = DistributedDataParallel(wrapped, device_ids=devices)
            yield wrapped
        finally:
            if settings.grad_checkpointing:
                _checkpoint_activations(model, on=False)

    def micro_step(self, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch: only the ``last`` of a step talks to other processes."""
        if last or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()

    def backward(self, objective: Tensor) -> None:
        """Add the gradients of a scalar to those that are there."""
        self.scaler.scale(objective).backward()

    def clip(self) -> Tensor:
        """Limit the norm of all gradients to ``clip_grad`` (0: no limit); returns the norm before, a scalar."""
        self.scaler.unscale_(self._optimizer)
        return nn.utils.clip_grad_norm_(self._tensors, self._settings.clip_grad or float("inf"))

    def step(self) -> None:
        """Update what is trained and drop its gradients. In fp16, a gradient that is not finite skips the update."""
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)


def check_precision(amp: str, device: torch.device) -> None:
    """Refuse what a device does not train in.

    Raises:
        ConfigError: fp16 on a CPU, or bf16 on a GPU that is too old.
    """
    if amp == "fp16" and device.type == "cpu":
        raise ConfigError("amp is 'fp16', which CPUs do not train in; allowed there: 'no', 'bf16'")
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("amp is 'bf16', which this GPU does not compute in; allowed there: 'no', 'fp16'")


def mixed_precision(model: nn.Module, device: torch.device, amp: str) -> nn.Module:
    """A model that runs in ``amp`` ("bf16", "fp16") and whose outputs are float32; for "no" the model itself."""
    return model if amp == "no" else _MixedPrecision(model, device.type, _HALF[amp])


class _Around(nn.Module):
    """Calls a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class _MixedPrecision(_Around):
    """Calls a model under autocast."""

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__(model)
        self.device_type, self.dtype = device_type, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            outputs = super().forward(*args, **kwargs)
        return _float32(outputs)


def _float32(outputs: Any) -> Any:
    """What a model gave, half-precision tensors as float32; also in tuples, lists and dictionaries."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in _HALF.values() else outputs
    if isinstance(outputs, (tuple, list)):
        make = getattr(outputs, "_make", type(outputs))  # named tuples take no iterable
        return make(map(_float32, outputs))
    if isinstance(outputs, Mapping):
        return type(outputs)({key: _float32(value) for key, value in outputs.items()})  # type: ignore[call-arg]
    return outputs


def _checkpoint_activations(model: Any, *, on: bool) -> None:
    """Compute activations again in backward, block by block, if the model is one of timm's or diffusers'."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(on)
    elif hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
    else:
        raise ConfigError("grad_checkpointing is on, but the model has no set_grad_checkpointing (timm's have)")
