"""Learnable layers under autocast: the product in 16 bits, the masks in 32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mask_oracle import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.layers import LearnableMaskedLinear
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.surgery import set_noise_key

every_half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
every_layer = pytest.mark.parametrize(("n", "hard"), [(2, False), (2, True), (1, False)])


def fixed(n: int = 2, hard: bool = False) -> LearnableMaskedLinear:
    """A layer that draws the same noise each time."""
    layer = LearnableMaskedLinear(32, 12, N=n, hard=hard, scaling=10.0)
    assert isinstance(layer.bias, nn.Parameter)
    set_noise_key(layer, NoiseKey())
    return layer


@every_half
@every_layer
def test_layer_multiplies_the_rounded_masked_weight(n: int, hard: bool, half: torch.dtype) -> None:
    layer, x = fixed(n, hard), torch.randn(2, 5, 32)
    masked, energy = layer.masked_weight()
    with torch.autocast("cpu", half):
        output = layer(x)
    assert output.dtype is half
    assert torch.equal(output, F.linear(x.to(half), masked.to(half), layer.bias.to(half)))
    # of the values before they are rounded
    assert torch.equal(layer.kept_energy, energy)
    assert layer.kept_energy.dtype is torch.float32
    assert not torch.equal(energy, masked.to(half).float().square().sum())


def test_masked_weight_is_written_rounded() -> None:
    """No whole one in 32 bits that would be copied."""
    layer, x = fixed(), torch.randn(5, 32)
    copied: list[int] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket is torch.ops.aten._to_copy:
                copied.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Copies():
        layer(x)
    assert x.numel() in copied
    assert layer.weight.numel() not in copied


@every_half
@every_layer
def test_gradients_are_those_of_32_bits(n: int, hard: bool, half: torch.dtype) -> None:
    layer, x = fixed(n, hard), torch.randn(5, 32)
    with torch.autocast("cpu", half):
        output = layer(x)
    upstream = torch.randn_like(output)
    torch.autograd.backward([output, layer.kept_energy], [upstream, torch.tensor(-0.37)])
    found, layer.logits.grad = layer.logits.grad, None

    masked, energy = layer.masked_weight()
    rounded = masked.detach().to(half).requires_grad_()
    F.linear(x.to(half), rounded, layer.bias.to(half)).backward(upstream)
    assert rounded.grad.dtype is half
    torch.autograd.backward([masked, energy], [rounded.grad.float(), torch.tensor(-0.37)])
    assert found.dtype is torch.float32
    assert torch.equal(found, layer.logits.grad)


def test_float64_is_left_alone() -> None:
    layer, x, found = fixed().double(), torch.randn(5, 32, dtype=torch.float64), []
    for enabled in (False, True):
        layer.logits.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(x)
        (output.square().sum() - layer.kept_energy).backward()
        assert output.dtype is layer.kept_energy.dtype is torch.float64
        found.append((output.detach(), layer.kept_energy.detach(), layer.logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_half
@pytest.mark.parametrize(("backend", "hard"), [("chunked", False), ("chunked", True), ("compiled", False)])
def test_type_of_the_masked_weight_alone(backend: str, hard: bool, half: torch.dtype) -> None:
    case = Case(out=64, dtype=torch.float32)

    def run(dtype: torch.dtype | None, upstream: Tensor) -> list[Tensor]:
        logits, weight = case.logits.clone().requires_grad_(), case.weight.clone().requires_grad_()
        how = {"tau": 1.0, "scaling": 10.0, "hard": hard, "key": case.key, "backend": backend}
        masked, energy = masked_weight(weight, logits, case.candidates, dtype=dtype, **how)
        torch.autograd.backward([masked, energy], [upstream.to(masked.dtype), torch.tensor(-0.37)])
        return [masked.detach(), energy.detach(), logits.grad, weight.grad]

    rounded, whole = run(half, case.upstream.to(half)), run(None, case.upstream.to(half))
    assert rounded[0].dtype is half
    assert torch.equal(rounded[0], whole[0].to(half))
    for a, b in zip(rounded[1:], whole[1:], strict=True):
        assert a.dtype is torch.float32
        assert torch.equal(a, b)
