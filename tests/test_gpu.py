"""The same numbers on a CUDA device as on the CPU."""

from __future__ import annotations

import pytest
import torch

from maskllm4v.oneshot.prune import available, prune
from maskllm4v.sparsity.layers import LearnableMaskedLinear
from maskllm4v.sparsity.learnable import NoiseKey

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("hard", [False, True])
def test_mask_operation(hard: bool) -> None:
    layer = LearnableMaskedLinear(64, 48, hard=hard, tau=0.7, scaling=20.0, name="fc1")
    layer.draw = NoiseKey(seed=3, step=5)
    found = []
    for device in ("cpu", "cuda"):
        layer.to(device).zero_grad()
        weight, energy = layer.masked_weight()
        (weight.sum() + energy).backward()
        assert layer.logits.grad is not None
        found.append((weight.detach().cpu(), layer.logits.grad.cpu().clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    # Gradients are differences of products as large as the largest of them, in float32 on either device.
    largest = float(found[0][1].abs().max())
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("method", available())
def test_pruning(method: str) -> None:
    masks = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 8)).to(device)
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).to(device)
        masks.append({name: mask.cpu() for name, mask in prune(model, method, calibration=x).items()})
    for name, mask in masks[0].items():
        assert (mask == masks[1][name]).float().mean() > 0.999
