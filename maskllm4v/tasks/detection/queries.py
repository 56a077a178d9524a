"""Detectors of transformers: each query gives the classes and the box of one object, or of none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.data.annotated import NONE, AnnotatedBatch
from maskllm4v.tasks.detection.matching import (
    Targets,
    box_cost,
    box_loss,
    focal_cost,
    match,
    overlap,
    softmax_cost,
    varifocal_loss,
)
from maskllm4v.tasks.detection.model import Detections, centred, cornered
from maskllm4v.tasks.detection.selection import SelectedTokens, paired
from maskllm4v.tasks.detection.settings import MASKED, DetectionSettings, DetectorSettings
from maskllm4v.tasks.named_outputs import NamedOutputs
from maskllm4v.tasks.transformers_folder import CONFIG, build, label_names, num_labels
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.text import few

NO_OBJECT = 0.1  # weight of the cross-entropy where there is no object (Carion et al. 2020, Section A.4)

Outputs = dict[str, Tensor]  # "logits" [B, Q, classes], "boxes" [B, Q, 4]: centre and sides in shares of the image


class Queries:
    """What detectors with queries have in common.

    Args:
        settings: how many detections there are.
        model: which model, from which folder.
    """

    outputs = ("logits", "pred_boxes")
    paired = True

    def __init__(self, settings: DetectionSettings, model: DetectorSettings) -> None:
        assert model.folder is not None
        self.settings, self.model, self.folder = settings, model, Path(model.folder)
        self._labels: list[int] | None = None  # of the data's classes; None: they have the same numbers

    def build(self, settings: DetectorSettings, seed: int, *, pretrained: bool) -> nn.Module:
        """With the folder's weights, or with those drawn from the seed.

        Raises:
            ConfigError, CheckpointError: see :mod:`maskllm4v.tasks.transformers_folder`; or the folder is of a model
                with another number of classes.
        """
        if (count := num_labels(self.folder)) != settings.classes:
            raise ConfigError(f"model.classes is {settings.classes}, but {self.folder / CONFIG} has {count} classes")
        fused = settings.fused_attention
        model = build(settings.name, self.folder, seed, pretrained=pretrained, fused_attention=fused)
        for name, module in model.named_modules():
            if name.endswith("denoising_class_embed"):  # of queries that are made of noise, which nothing here is
                module.requires_grad_(False)
        return model

    def name_classes(self, names: Sequence[str], data: str) -> None:
        """Find the data's classes among the model's by name, or by number where the model names none.

        Raises:
            ConfigError: the model does not know a class, or has none of names and another number of them.
        """
        known = label_names(self.folder)
        if known is None and len(names) != self.model.classes:
            raise ConfigError(
                f"model.classes is {self.model.classes}, but {data} has objects of {len(names)} classes; to find them "
                f"by name, {self.folder / CONFIG} needs their names in id2label"
            )
        if known is None:
            return
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                f"{self.folder / CONFIG}: id2label has no {few(unknown)}, but {data} has objects of it; there are {few(known)}"
            )
        self._labels = [known.index(name) for name in names]

    def learning_mode(self, model: nn.Module) -> None:
        """The mode that masks are learned in: that of use, without dropout and without further groups of queries."""
        model.eval()

    def exportable(self, model: nn.Module) -> nn.Module:
        return NamedOutputs(model, self.outputs)

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Outputs:
        found = self._run(model, batch)
        return {"logits": found.logits, "boxes": found.pred_boxes}

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        """How many objects there are."""
        return (batch.classes != NONE).sum()

    def loss(self, outputs: Outputs, batch: AnnotatedBatch) -> Tensor:
        """Of the last layer and of all others that are given, each matched with the objects on its own.

        So are groups of queries (Chen et al. 2023), of which all together count as one.
        """
        logits, boxes = (
            torch.cat([outputs[name][:, None], outputs[f"auxiliary_{name}"]], 1)
            if f"auxiliary_{name}" in outputs
            else outputs[name][:, None]
            for name in ("logits", "boxes")
        )
        groups = self._groups(outputs)
        logits, boxes = (found.float().unflatten(2, (groups, -1)) for found in (logits, boxes))  # [B, L, G, Q, ...]
        objects = Targets(*(part.repeat_interleave(logits.shape[1] * groups, 0) for part in self._targets(batch)))
        return self._set_loss(logits.flatten(0, 2), boxes.flatten(0, 2), objects) / groups

    def _run(self, model: nn.Module, batch: AnnotatedBatch) -> Any:
        if self.model.name not in MASKED:
            return model(pixel_values=batch.images)
        height, width = batch.images.shape[2:]
        sides = _sides(batch)
        across = torch.arange(width, device=sides.device) < sides[:, :1]
        down = torch.arange(height, device=sides.device) < sides[:, 1:]
        return model(pixel_values=batch.images, pixel_mask=(down[:, :, None] & across[:, None]).long())

    def _groups(self, outputs: Outputs) -> int:
        return 1

    def _set_loss(self, logits: Tensor, boxes: Tensor, objects: Targets) -> Tensor:
        """Sum over sets of queries, ``[S, Q, ...]``, of each of which the objects are to be found."""
        raise NotImplementedError

    def _targets(self, batch: AnnotatedBatch) -> Targets:
        classes = batch.classes
        if self._labels is not None:
            labels = torch.tensor(self._labels, device=classes.device)
            classes = torch.where(classes == NONE, NONE, labels[classes.clamp(min=0)])
        return Targets(classes, centred(batch.boxes) / _sides(batch).repeat(1, 2)[:, None])

    def _known(self, scores: Tensor) -> Tensor:
        """Of scores ``[..., labels]`` those of the data's classes, in their order."""
        return scores if self._labels is None else scores[..., self._labels]

    def _detections(self, boxes: Tensor, queries: Tensor, classes: Tensor, scores: Tensor, sides: Tensor) -> Detections:
        chosen = boxes.float().gather(1, queries[..., None].expand(-1, -1, 4))
        return Detections(cornered(chosen) * sides.repeat(1, 2)[:, None], classes, scores)


class LearnedQueries(Queries):
    """YOLOS (Fang et al. 2021) and DETR (Carion et al. 2020): learned queries, and a class that says "no object"."""

    def detections(self, outputs: Outputs, batch: AnnotatedBatch) -> Detections:
        """Each query gives its likeliest class, as DETR's authors have it."""
        found, classes = self._known(outputs["logits"].float().softmax(-1)[..., :-1]).max(-1)
        scores, queries = found.topk(min(self.settings.detections, found.shape[1]), 1)
        return self._detections(outputs["boxes"], queries, classes.gather(1, queries), scores, _sides(batch))

    def distillation_loss(
        self, outputs: Outputs, teacher: Outputs, temperature: float, batch: AnnotatedBatch
    ) -> Tensor:
        """T²·KL(teacher ‖ student) of classes at temperature T (Hinton et al. 2015), and the boxes' loss.

        The i-th query is a parameter, so it is the same one in both. As in training, the teacher's "no object" weighs
        little: :data:`NO_OBJECT` in the KL, nothing in the boxes' loss.
        """
        student, target = (F.log_softmax(found["logits"].float() / temperature, -1) for found in (outputs, teacher))
        divergence = F.kl_div(student, target, log_target=True, reduction="none").sum(-1)
        sure = 1 - teacher["logits"].float().softmax(-1)[..., -1]
        classes = ((sure + NO_OBJECT * (1 - sure)) * divergence).sum()
        return temperature**2 * classes + box_loss(outputs["boxes"].float(), teacher["boxes"].float(), sure)

    def _set_loss(self, logits: Tensor, boxes: Tensor, objects: Targets) -> Tensor:
        """Cross-entropy of all queries' classes, and the loss of the matched ones' boxes (Carion et al. 2020, Eq. 2).

        All is divided by the number of objects in the end, the cross-entropy too, which DETR divides by the sum of its
        weights: that is not known of a whole step before its parts are run.
        """
        found = match(softmax_cost(logits, objects.classes) + box_cost(boxes, objects.boxes), objects)
        wanted = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
        wanted[found.image, found.query] = objects.classes[found.image, found.object]
        weight = logits.new_ones(logits.shape[2])
        weight[-1] = NO_OBJECT
        entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, reduction="sum")
        return entropy + box_loss(boxes[found.image, found.query], objects.boxes[found.image, found.object])


class SelectedQueries(Queries):
    """RT-DETR (Zhao et al. 2024), RT-DETR v2, D-FINE and RF-DETR: queries of the encoder's surest tokens, no "no object"."""

    paired = False  # pruning moves queries

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
        return self._detections(outputs["boxes"], queries, classes, scores, _sides(batch))

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

    def _groups(self, outputs: Outputs) -> int:
        return outputs["tokens"].shape[1]

    def _set_loss(self, logits: Tensor, boxes: Tensor, objects: Targets) -> Tensor:
        """Varifocal loss of all queries' scores, and the loss of the matched ones' boxes, as RT-DETR has it."""
        found = match(focal_cost(logits, objects.classes) + box_cost(boxes, objects.boxes), objects)
        own, true = boxes[found.image, found.query], objects.boxes[found.image, found.object]
        target = torch.zeros_like(logits)
        target[found.image, found.query, objects.classes[found.image, found.object]] = overlap(own.detach(), true)
        return varifocal_loss(logits, target) + box_loss(own, true)


def _sides(batch: AnnotatedBatch) -> Tensor:
    """Width and height of images without padding, in pixels, int64 ``[B, 2]``."""
    return batch.valid.flip(1)
