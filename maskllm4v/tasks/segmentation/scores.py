"""Mean intersection over union, from one confusion matrix of all pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskllm4v.data.annotated import IGNORED
from maskllm4v.utils import distributed


class SegmentationScores:
    """Counts pixels in integers, over any number of processes; each pixel weighs the same, whatever its image.

    Args:
        classes: their names.
        device: where outputs lie.
    """

    def __init__(self, classes: Sequence[str], device: torch.device) -> None:
        self.names = tuple(classes)
        count = len(self.names)
        self.confusion = torch.zeros(count, count, dtype=torch.int64, device=device)  # [truth, found]
        self._same = torch.zeros(2, dtype=torch.int64, device=device)  # pixels alike, pixels
        self._compared = False

    def add(self, logits: Tensor, masks: Tensor, dense: Tensor | None = None) -> None:
        """Take in outputs ``[B, K, H, W]``, masks ``[B, H, W]`` and, if given, the dense model's outputs."""
        found, counted = logits.argmax(1), masks != IGNORED
        count = len(self.names)
        pairs = masks[counted] * count + found[counted]
        self.confusion += torch.bincount(pairs, minlength=count**2).view(count, count)
        if dense is not None:
            self._compared = True
            self._same += torch.stack([(dense.argmax(1) == found)[counted].sum(), counted.sum()])

    def metrics(self) -> dict[str, float]:
        """Of all processes together, in percent.

        ``miou``: mean over classes of |truth ∩ found| / |truth ∪ found|, without classes that are in neither.
        ``pixel_accuracy``: share of pixels that are right. ``agreement``: with the dense model. ``iou/<class>``: of
        each class that is there.
        """
        distributed.sum_(self.confusion, self._same)
        confusion = self.confusion.double().cpu()
        right = confusion.diag()
        union = confusion.sum(0) + confusion.sum(1) - right
        shares = {name: float(r / u) for name, r, u in zip(self.names, right, union, strict=True) if u > 0}
        found = {
            "miou": 100 * sum(shares.values()) / len(shares),
            "pixel_accuracy": 100 * float(right.sum() / confusion.sum()),
        }
        if self._compared:
            same, pixels = self._same.tolist()
            found["agreement"] = 100 * same / pixels
        return found | {f"iou/{name}": 100 * share for name, share in shares.items()}
