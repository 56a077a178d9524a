"""Mean intersection over union, from one confusion matrix of all pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.config.metrics import rarest
from maskllm4v.data.annotated import IGNORED
from maskllm4v.utils import distributed

INNER, BORDER = 0, 1  # places of the confusion matrices


class SegmentationScores:
    """Counts pixels in integers, over any number of processes; each pixel weighs the same, whatever its image.

    Args:
        classes: their names.
        border: how far the border between two classes reaches to either side, in pixels.
        device: where outputs lie.
    """

    def __init__(self, classes: Sequence[str], border: int, device: torch.device) -> None:
        self.names, self.border = tuple(classes), border
        count = len(self.names)
        self.confusion = torch.zeros(2, count, count, dtype=torch.int64, device=device)  # [place, truth, found]
        self._same = torch.zeros(2, dtype=torch.int64, device=device)  # pixels alike, pixels
        self._compared = False

    def add(self, logits: Tensor, masks: Tensor, dense: Tensor | None = None) -> None:
        """Take in outputs ``[B, K, H, W]``, masks ``[B, H, W]`` and, if given, the dense model's outputs."""
        found, counted, count = logits.argmax(1), masks != IGNORED, len(self.names)
        cells = (near_border(masks, self.border) * count + masks) * count + found
        self.confusion += torch.bincount(cells[counted], minlength=2 * count**2).view_as(self.confusion)
        if dense is not None:
            self._compared = True
            self._same += torch.stack([(dense.argmax(1) == found)[counted].sum(), counted.sum()])

    def metrics(self) -> dict[str, float]:
        """Of all processes together, in percent.

        ``miou``: mean over classes of |truth ∩ found| / |truth ∪ found|, without classes that are in neither;
        ``iou/<class>``: of each that is there. ``miou_border``, ``miou_inner``: the same of the pixels near borders and
        of all others, where there are any; ``miou_rare``: mean over the third of the classes that have the fewest
        pixels. ``pixel_accuracy``: share of pixels that are right. ``agreement``: with the dense model.
        """
        distributed.sum_(self.confusion, self._same)
        parts = self.confusion.cpu()
        whole = parts.sum(0)
        of_classes = self._intersections_over_unions(whole)
        found = {"miou": _mean(of_classes), "pixel_accuracy": 100 * int(whole.trace()) / int(whole.sum())}
        if self._compared:
            same, pixels = self._same.tolist()
            found["agreement"] = 100 * same / pixels
        for name, part in (("miou_border", parts[BORDER]), ("miou_inner", parts[INNER])):
            if of_part := self._intersections_over_unions(part):
                found[name] = _mean(of_part)
        rare = rarest(dict(zip(self.names, whole.sum(1).tolist(), strict=True)))
        found["miou_rare"] = _mean({name: of_classes[name] for name in rare})
        return found | {f"iou/{name}": value for name, value in of_classes.items()}

    def _intersections_over_unions(self, confusion: Tensor) -> dict[str, float]:
        """In percent, of the classes that are in truth or found."""
        right = confusion.diag()
        union = confusion.sum(0) + confusion.sum(1) - right
        counts = zip(self.names, right.tolist(), union.tolist(), strict=True)
        return {name: 100 * inner / outer for name, inner, outer in counts if outer}


def near_border(masks: Tensor, reach: int) -> Tensor:
    """Which pixels have another class in the square of ``2·reach + 1`` pixels around them: bool ``[B, H, W]``.

    Pixels that are :data:`IGNORED` are no other class, and the image's edge is no border.
    """
    side, known = 2 * reach + 1, masks != IGNORED
    largest, smallest = (
        F.max_pool2d((sign * masks).float().masked_fill(~known, -torch.inf), side, stride=1, padding=reach)
        for sign in (1, -1)
    )
    return largest != -smallest


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
