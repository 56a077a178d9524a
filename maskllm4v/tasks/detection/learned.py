"""Detectors of transformers whose queries are parameters: YOLOS and DETR."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.data.annotated import AnnotatedBatch
from maskllm4v.tasks.detection.matching import Targets, box_cost, box_loss, match, softmax_cost
from maskllm4v.tasks.detection.model import Detections
from maskllm4v.tasks.detection.queries import Outputs, Queries, inside
from maskllm4v.tasks.shared.transformers_folder import load_config
from maskllm4v.utils.errors import ConfigError

STRIDES = (4, 8, 14, 16, 32, 64)  # pixels between tokens, of which one is a model's own
NO_OBJECT = 0.1  # weight of the cross-entropy where there is no object (Carion et al. 2020, Section A.4)


class LearnedQueries(Queries):
    """YOLOS (Fang et al. 2021) and DETR (Carion et al. 2020): learned queries, and a class that says "no object"."""

    def tokens(self, name: str, shape: torch.Size, batch: AnnotatedBatch) -> Tensor | None:
        """All but those of patches that are padding, as DETR has it: it looks at a patch's first pixel.

        Raises:
            ConfigError: these are not the tokens of a grid over the images.
        """
        height, width = batch.images.shape[2:]
        of_queries = ".decoder." in name and not name.endswith((".encoder_attn.k_proj", ".encoder_attn.v_proj"))
        if of_queries or bool((batch.valid.cpu() == torch.tensor([height, width])).all()):
            return None
        before, after = (1, self._config.num_detection_tokens) if self._config.model_type == "yolos" else (0, 0)
        for step in STRIDES:
            grid = -(-height // step), -(-width // step)
            if grid[0] * grid[1] == shape[1] - before - after:
                seen = F.interpolate(inside(batch)[:, None].float(), grid).flatten(1).bool()
                return F.pad(seen, (before, after), value=True)
        raise ConfigError(f"calibration: layer {name!r} sees {shape[1]} tokens; which of them are padding is not known")

    @cached_property
    def _config(self) -> Any:
        return load_config(self.model.name, self.folder)

    def detections(self, outputs: Outputs, batch: AnnotatedBatch) -> Detections:
        """Each query gives its likeliest class, as DETR's authors have it."""
        found, classes = self._known(outputs["logits"].float().softmax(-1)[..., :-1]).max(-1)
        scores, queries = found.topk(min(self.settings.detections, found.shape[1]), 1)
        return self._detections(outputs["boxes"], queries, classes.gather(1, queries), scores, self._sides(batch))

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
