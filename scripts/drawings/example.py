"""Groups of four weights with learnable 2:4 masks, as training starts with them: the numbers that drawings show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.sparsity.layers import LearnableMaskedLinear, dense_weight
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.surgery import make_learnable
from maskllm4v.utils.rng import philox_key

PATTERN = NMPattern("2:4")
WEIGHTS = (0.31, -0.52, 0.08, 0.44)  # magnitude keeps the second and the fourth
GROUPS = 64  # alike but for the noise in their logits
CHOSEN = 40  # three of its candidates are about as likely


@dataclass(frozen=True)
class Group:
    """One group: its weights, magnitude's mask of them, and the logits of the six candidates."""

    weights: Tensor  # [4]
    prior: Tensor  # [4], boolean
    logits: Tensor  # [6]

    def sample(self, tau: float, scaling: float, draws: int) -> tuple[Tensor, Tensor]:
        """Probabilities ``[draws, 6]`` and soft masks ``[draws, 4]``, each with noise of its own, rounded to 1e-4.

        Masks are what the operation makes of weights that are 1, probabilities what it makes of candidates that
        are the six unit vectors.
        """
        found = []
        for candidates in (torch.eye(6, dtype=torch.float64), PATTERN.candidates(dtype=torch.float64)):
            ones = torch.ones(draws, candidates.shape[1], dtype=torch.float64)
            logits = self.logits[:, None].expand(-1, draws).contiguous()
            key = philox_key(0, "figure")
            masked, _ = masked_weight(ones, logits, candidates, tau=tau, scaling=scaling, key=key)
            found.append((masked * 1e4).round() / 1e4)
        return found[0], found[1]


def group() -> Group:
    """The example, its logits drawn and shifted towards the prior as training does, by default."""
    linear = nn.Linear(4, GROUPS, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(torch.tensor([WEIGHTS] * GROUPS))
    prior = PATTERN.topn_mask(linear.weight.detach().abs())
    model = make_learnable(nn.Sequential(linear), {"0": prior}, pattern=PATTERN)
    layer = model[0]
    assert isinstance(layer, LearnableMaskedLinear)
    return Group(dense_weight(layer).detach()[CHOSEN], prior[CHOSEN], layer.logits.detach()[:, CHOSEN])
