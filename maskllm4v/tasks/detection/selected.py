"""Detectors of transformers whose queries are the encoder's surest tokens: RT-DETR, D-FINE and RF-DETR.

Pruning moves a few queries to other tokens, and others to other places among the queries, so that the i-th query of a
pruned model and the i-th one of the dense model need not have to do with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskllm4v.data.annotated import AnnotatedBatch
from maskllm4v.tasks.detection.matching import (
    Targets,
    box_cost,
    box_loss,
    focal_cost,
    match,
    overlap,
    varifocal_loss,
)
from maskllm4v.tasks.detection.model import Detections
from maskllm4v.tasks.detection.queries import Outputs, Queries
from maskllm4v.tasks.detection.settings import MASKED


class SelectedTokens(TorchFunctionMode):
    """Inside, keeps the tokens that a model selects by ``torch.topk`` among those of each image.

    transformers' outputs do not name them for every class; its models select in no other way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.topk and result.indices.ndim == 2:
            self._found.append(result.indices)
        return result

    @property
    def tokens(self) -> Tensor:
        """Their places in the encoder's sequence in the order of queries, int64 ``[B, G, Q]``, by group of queries."""
        return torch.stack(self._found, 1)


class Pairs(NamedTuple):
    """Queries of two networks that come from the same tokens of the same images, M in all.

    Attributes:
        image, query, other: where they are, int64 ``[M]`` each; ``query`` is the first network's.
    """

    image: Tensor
    query: Tensor
    other: Tensor


def paired(tokens: Tensor, others: Tensor) -> Pairs:
    """The queries of both whose tokens ``[B, Q]`` are the same; a network selects no token of an image twice."""
    return Pairs(*(tokens[:, :, None] == others[:, None]).nonzero(as_tuple=True))


class SelectedQueries(Queries):
    """RT-DETR (Zhao et al. 2024), its v2, D-FINE, RF-DETR: queries are the encoder's surest tokens; no "no object"."""

    # Not those of queries, which pruning moves.
    paired_layers: tuple[str, ...] = ("model.backbone.*", "model.encoder.*", "*.value_proj")

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Outputs:
        """Also ``auxiliary_logits`` and ``auxiliary_boxes`` ``[B, L, Q, ...]``, and ``tokens`` ``[B, G, Q]``.

        Those of the decoder's layers, as far as the model gives them, and of the encoder, whose tokens are selected.
        In training mode RF-DETR has G groups of queries, which stand one after the other.
        """
        with SelectedTokens() as selected:
            found = self._run(model, batch)
        if "enc_topk_logits" in found:
            layers, places = found.intermediate_logits[:, :-1], found.intermediate_reference_points[:, :-1]
            logits, boxes = found.enc_topk_logits, found.enc_topk_bboxes
            others = torch.cat([layers, logits[:, None]], 1), torch.cat([places, boxes[:, None]], 1)
        else:
            others = found.enc_outputs_class[:, None], found.enc_outputs_coord_logits[:, None]
        return {
            "logits": found.logits,
            "boxes": found.pred_boxes,
            "auxiliary_logits": others[0],
            "auxiliary_boxes": others[1],
            "tokens": selected.tokens,
        }

    def detections(self, outputs: Outputs, batch: AnnotatedBatch) -> Detections:
        """The surest pairs of a query and a class, as RT-DETR's authors have it."""
        found = self._known(outputs["logits"].float().sigmoid())
        scores, places = found.flatten(1).topk(min(self.settings.detections, found[0].numel()), 1)
        queries, classes = places // found.shape[2], places % found.shape[2]
        return self._detections(outputs["boxes"], queries, classes, scores, self._sides(batch))

    def distillation_loss(
        self, outputs: Outputs, teacher: Outputs, temperature: float, batch: AnnotatedBatch
    ) -> Tensor:
        """T²·KL(teacher ‖ student) of each class's score at temperature T, and the boxes' loss.

        Of queries that come from the same token in both; others are left out (:meth:`kept`). A box weighs as much as
        the teacher is sure of its likeliest class.
        """
        pairs = paired(outputs["tokens"][:, 0], teacher["tokens"][:, 0])
        own, dense = (
            {name: found[name].float()[pairs.image, query] for name in ("logits", "boxes")}
            for found, query in ((outputs, pairs.query), (teacher, pairs.other))
        )
        logits, target = own["logits"] / temperature, dense["logits"] / temperature
        there = target.sigmoid() * (F.logsigmoid(target) - F.logsigmoid(logits))
        absent = (-target).sigmoid() * (F.logsigmoid(-target) - F.logsigmoid(-logits))
        sure = dense["logits"].sigmoid().amax(-1)
        return temperature**2 * (there + absent).sum() + box_loss(own["boxes"], dense["boxes"], sure)

    def kept(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """How many of the dense model's queries the model has, too, of the same tokens; and how many there are."""
        tokens, others = outputs["tokens"], dense["tokens"]
        count = paired(tokens[:, 0], others[:, 0]).image.numel()
        return torch.tensor([count, others.numel()], device=others.device)

    def _sides(self, batch: AnnotatedBatch) -> Tensor:
        """With the padding, which augmentation may add, where a model is not told of it."""
        if self.model.name in MASKED:
            return super()._sides(batch)
        return torch.tensor(batch.images.shape[:1:-1], device=batch.valid.device).expand(len(batch.images), -1)

    def _groups(self, outputs: Outputs) -> int:
        return outputs["tokens"].shape[1]

    def _set_loss(self, logits: Tensor, boxes: Tensor, objects: Targets) -> Tensor:
        """Varifocal loss of all queries' scores, and the loss of the matched ones' boxes, as RT-DETR has it."""
        found = match(focal_cost(logits, objects.classes) + box_cost(boxes, objects.boxes), objects)
        own, true = boxes[found.image, found.query], objects.boxes[found.image, found.object]
        target = torch.zeros_like(logits)
        target[found.image, found.query, objects.classes[found.image, found.object]] = overlap(own.detach(), true)
        return varifocal_loss(logits, target) + box_loss(own, true)
