"""Inputs of the Triton kernels, and what they make of them."""

from __future__ import annotations

import mask_oracle
import pytest
import torch
from mask_oracle import Case, table
from torch import Tensor

from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.utils.rng import philox_key

fused = pytest.importorskip("maskllm4v.sparsity.gumbel.triton_op")

CANDIDATES = table(2, 4)
KEY = tuple(map(int, philox_key(0, "case")))  # draws a case's uniforms


class KernelCase(Case):
    """2:4 in float32, a group a row."""

    def __init__(self, groups: int) -> None:
        super().__init__(out=groups, groups_per_row=1, dtype=torch.float32)

    def textbook(self, sampling: Sampling, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        how = {"tau": sampling.tau, "scaling": sampling.scaling, "hard": sampling.hard, "uniform": sampling.uniform}
        return self.run(mask_oracle.textbook, dtype, **how)

    def kernels(
        self, sampling: Sampling, device: torch.device, dtype: torch.dtype = torch.float32, weight_grad: bool = True
    ) -> list[Tensor]:
        """The same, on the CPU again."""
        weight, logits, candidates = (t.to(device) for t in (self.weight, self.logits, CANDIDATES))
        if sampling.uniform is not None:
            sampling = Sampling(
                sampling.tau, sampling.scaling, sampling.hard, sampling.key, sampling.uniform.to(device)
            )
        assert fused.supported(weight, logits, candidates, sampling)
        masked, energy = fused.forward(weight, logits, candidates, sampling, dtype)
        assert masked.dtype is dtype
        assert energy.dtype is torch.float32
        assert energy.shape == ()
        upstream, grad_energy = self.upstream.to(device), torch.tensor(self.grad_energy, device=device)
        gradients = fused.backward(weight, logits, candidates, sampling, upstream, grad_energy, weight_grad)
        assert gradients[0].dtype is logits.dtype
        assert gradients[1] is None or gradients[1].dtype is weight.dtype
        return [t.cpu() for t in (masked, energy, *gradients) if t is not None]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to what two compilations may round differently."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.abs().max()))
