"""RIA, relative importance and activations: "Plug-and-Play", Zhang et al., ICLR 2024."""

import torch
from torch import Tensor

from maskllm4v.oneshot.activations.statistics import InputNorm
from maskllm4v.oneshot.methods.result import Pruned
from maskllm4v.sparsity.patterns import NMPattern

EXPONENT = 0.5  # a, the authors' own


def prune_ria(
    weight: Tensor,
    statistic: InputNorm,
    pattern: NMPattern,
    *,
    update_weights: bool,
    layer: str,
    seed: int,
    exponent: float = EXPONENT,
) -> Pruned:
    """Score (|W_ij| / Σ_i′ |W_i′j| + |W_ij| / Σ_j′ |W_ij′|) · ‖x_j‖₂^a, compared within the groups of each output row.

    A weight of a row or column that is all zero scores zero. For another a::

        maskllm4v.register_pruner("ria-1", statistic=InputNorm, propagate="pruned")(partial(prune_ria, exponent=1.0))
    """
    size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    share = sum(size / total.masked_fill(total == 0, 1) for total in (size.sum(0, keepdim=True), size.sum(1, True)))
    return Pruned(pattern.topn_mask(share * statistic.sum_of_squares.sqrt() ** exponent, layer))
