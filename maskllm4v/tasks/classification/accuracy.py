"""Counting hits: accuracy, cross-entropy, calibration error and agreement, over any number of processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.utils import distributed

BINS = 15  # of confidence, as in Guo et al. 2017


class ClassificationMetrics:
    """Sums over samples, each counted once, in float64 on the device.

    Args:
        device: where outputs lie.
    """

    def __init__(self, device: torch.device) -> None:
        kind = torch.float64 if device.type != "mps" else torch.float32
        self._sums = torch.zeros(5, dtype=kind, device=device)  # count, top-1, top-5, nll, agreement
        self._bins = torch.zeros(3, BINS, dtype=kind, device=device)  # count, Σ confidence, hits
        self._compared = False

    def add(self, logits: Tensor, labels: Tensor, dense: Tensor | None = None) -> None:
        """Take in outputs ``[B, classes]``, labels ``[B]`` and, if given, the dense model's outputs."""
        logits = logits.float()
        ranked = _ranked(logits)
        hits = ranked == labels[:, None]
        first = hits[:, 0].to(self._sums)
        nll = F.cross_entropy(logits, labels, reduction="sum")
        same = logits.new_zeros(())
        if dense is not None:
            self._compared = True
            same = (_ranked(dense.float())[:, 0] == ranked[:, 0]).sum()
        counts = (torch.tensor(len(labels), device=logits.device), hits[:, 0].sum(), hits.any(1).sum(), nll, same)
        self._sums += torch.stack([value.to(self._sums) for value in counts])
        confidence = logits.softmax(1).amax(1).to(self._sums)
        bins = (confidence * BINS).ceil().long().clamp_(1, BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
        for row, values in zip(self._bins, (torch.ones_like(first), confidence, first), strict=True):
            row.index_put_((bins,), values, accumulate=True)

    def metrics(self) -> dict[str, float]:
        """Of all processes together: ``top1``, ``top5``, ``ece`` (and ``agreement``) in percent, ``nll`` in nats.

        ``ece`` is the expected calibration error: the mean over samples of their bin's
        |mean confidence − accuracy| (Guo et al. 2017, Eq. 3).
        """
        distributed.sum_(self._sums, self._bins)
        count, hits1, hits5, nll, same = self._sums.tolist()
        _, confidence, hits = self._bins
        found = {
            "top1": 100 * hits1 / count,
            "top5": 100 * hits5 / count,
            "nll": nll / count,
            "ece": 100 * float((confidence - hits).abs().sum()) / count,
        }
        return {**found, "agreement": 100 * same / count} if self._compared else found


def _ranked(logits: Tensor) -> Tensor:
    """The five likeliest classes ``[B, 5]``; one way for all models, so that ties are broken alike."""
    return logits.topk(min(5, logits.shape[1]), 1).indices
