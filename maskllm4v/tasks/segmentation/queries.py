"""Segmenters with queries, each of which gives a class and a mask: Mask2Former and EoMT.

The loss is that of Mask2Former (Cheng et al. 2022, Sec. 3.3): a class's pixels in an image are a segment, segments and
queries are matched one to one at the least cost, and the queries left over learn that they are nothing. Other than
there masks are compared on all pixels of the outputs rather than at random points, and sums are divided by the number
of segments rather than by means' own counts: the split of a batch over processes then changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.data.annotated import IGNORED, AnnotatedBatch
from maskllm4v.tasks.segmentation.folders import build_from_folder
from maskllm4v.tasks.segmentation.settings import SegmenterSettings
from maskllm4v.tasks.shared.named_outputs import NamedOutputs

CLASS, MASK, DICE = 2.0, 5.0, 5.0  # weights of the loss's terms and of the matching's, as published
NOTHING = 0.1  # weight of a query's class where it is nothing


@dataclass(frozen=True)
class Segments:
    """The segments of one image at the resolution of a model's masks, n pixels.

    Attributes:
        classes: int64 ``[S]``, ascending.
        masks: share of each of a pixel's part that has a class, float32 ``[S, n]``, from 0 to 1.
        valid: share of each pixel that has a class, float32 ``[n]``: what the pixel weighs.
    """

    classes: Tensor
    masks: Tensor
    valid: Tensor


class QueryFamily:
    """Outputs by name: ``class_queries_logits`` ``[B, Q, K + 1]``, the last one for nothing, and
    ``masks_queries_logits`` ``[B, Q, h, w]``."""

    outputs: tuple[str, ...] = ("class_queries_logits", "masks_queries_logits")

    def build(self, settings: SegmenterSettings, seed: int, *, pretrained: bool) -> nn.Module:
        return build_from_folder(settings, seed, pretrained=pretrained)

    def exportable(self, model: nn.Module) -> nn.Module:
        return NamedOutputs(model, self.outputs)

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> dict[str, Tensor]:
        found = model(pixel_values=batch.images)
        return {name: found[name] for name in self.outputs}

    def logits(self, outputs: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Sum over queries of class probability times mask probability, the masks' logits resized bilinearly."""
        classes, masks = _as_float(outputs)
        if masks.shape[2:] != size:
            masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], masks.sigmoid())

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        """How many segments there are: the classes of each image."""
        there = torch.zeros(len(batch.masks), IGNORED + 1, dtype=torch.int64, device=batch.masks.device)
        there.scatter_(1, batch.masks.flatten(1), 1)
        return there[:, :IGNORED].sum()

    def loss(self, outputs: dict[str, Tensor], batch: AnnotatedBatch) -> Tensor:
        """Classes' cross-entropy, masks' binary cross-entropy and Dice loss, weighed and summed over queries."""
        total = torch.zeros((), device=batch.masks.device)
        for classes, masks, truth in zip(*_as_float(outputs), batch.masks, strict=True):
            found = segments(truth, (masks.shape[1], masks.shape[2]))
            logits = masks.flatten(1)
            queries, matched = match(classes, logits, found)
            target = torch.full((len(classes),), classes.shape[1] - 1, device=classes.device)
            target[queries] = found.classes[matched]
            entropy = F.cross_entropy(classes, target, reduction="none")
            is_nothing = target == classes.shape[1] - 1
            total = total + CLASS * torch.where(is_nothing, NOTHING * entropy, entropy).sum()
            pairs = _mask_costs(logits[queries], found.masks[matched], found.valid)
            total = total + pairs.sum()
        return total

    def distillation_loss(
        self, outputs: dict[str, Tensor], teacher: dict[str, Tensor], temperature: float, batch: AnnotatedBatch
    ) -> Tensor:
        """T²·KL(teacher ‖ student) at temperature T of classes and of pixels' masks, query by query.

        Queries are parameters: the i-th means the same in both models. Weights are the loss's, with the teacher's
        probability that a query is something in the place of the matching. Pixels without a class count nothing.
        """
        (classes, masks), (dense_classes, dense_masks) = _as_float(outputs), _as_float(teacher)
        something = 1 - dense_classes.softmax(-1)[..., -1]
        own, target = (F.log_softmax(found / temperature, -1) for found in (classes, dense_classes))
        divergence = F.kl_div(own, target, log_target=True, reduction="none").sum(-1)
        total = (CLASS * (something + NOTHING * (1 - something)) * divergence).sum()
        own, target = masks / temperature, dense_masks / temperature
        by_pixel = F.binary_cross_entropy_with_logits(own, target.sigmoid(), reduction="none")
        by_pixel = by_pixel - F.binary_cross_entropy_with_logits(target, target.sigmoid(), reduction="none")
        valid = _resized((batch.masks != IGNORED).float(), (masks.shape[2], masks.shape[3]))
        share = valid / valid.sum((1, 2), keepdim=True).clamp(min=torch.finfo(valid.dtype).tiny)
        total = total + (MASK * something * (by_pixel * share[:, None]).sum((2, 3))).sum()
        return temperature**2 * total


def segments(truth: Tensor, size: tuple[int, int]) -> Segments:
    """The segments of a mask of classes ``[H, W]`` at another size, by the average over each pixel's area."""
    classes = truth.unique()
    classes = classes[classes != IGNORED]
    valid = _resized((truth != IGNORED).float()[None], size).flatten()
    shares = _resized((truth == classes[:, None, None]).float(), size).flatten(1)
    return Segments(classes, shares / valid.clamp(min=torch.finfo(valid.dtype).tiny), valid)


@torch.no_grad()
def match(classes: Tensor, masks: Tensor, found: Segments) -> tuple[Tensor, Tensor]:
    """The queries and the segments of an image that belong together, at the least total cost (Kuhn 1955).

    Args:
        classes: logits ``[Q, K + 1]``.
        masks: logits ``[Q, n]``.
        found: S segments.

    Returns:
        Indices ``[min(Q, S)]`` of queries and of segments.
    """
    from scipy.optimize import linear_sum_assignment

    targets, pixels = found.masks.T, found.valid.sum().clamp(min=torch.finfo(found.valid.dtype).tiny)
    entropy = (F.softplus(-masks) * found.valid) @ targets + (F.softplus(masks) * found.valid) @ (1 - targets)
    chances = masks.sigmoid() * found.valid
    sizes = chances.sum(1)[:, None] + found.valid @ targets
    dice = 1 - (2 * chances @ targets + 1) / (sizes + 1)
    cost = MASK * entropy / pixels + DICE * dice - CLASS * classes.softmax(-1)[:, found.classes]
    # What is not finite is told by the loss; here it would be scipy that stumbles.
    queries, matched = linear_sum_assignment(cost.nan_to_num(posinf=1e6, neginf=-1e6).cpu().numpy())
    return torch.from_numpy(queries).to(masks.device), torch.from_numpy(matched).to(masks.device)


def _mask_costs(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Weighed binary cross-entropy and Dice loss of masks ``[P, n]``, a value for each pair ``[P]``."""
    pixels = valid.sum().clamp(min=torch.finfo(valid.dtype).tiny)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    chances = logits.sigmoid() * valid
    dice = 1 - (2 * (chances * targets).sum(1) + 1) / (chances.sum(1) + (targets * valid).sum(1) + 1)
    return MASK * (entropy * valid).sum(1) / pixels + DICE * dice


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W]`` to ``[B, h, w]``, by the average over each pixel's area."""
    return F.interpolate(maps[:, None], size, mode="area")[:, 0] if len(maps) else maps.new_zeros(0, *size)


def _as_float(outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of classes and of masks in float32: under autocast they are of less."""
    return outputs["class_queries_logits"].float(), outputs["masks_queries_logits"].float()
