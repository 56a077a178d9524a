"""What detectors of transformers have alike: each query gives the classes and the box of one object, or of none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.data.annotated import NONE, AnnotatedBatch
from maskllm4v.tasks.detection.matching import Targets
from maskllm4v.tasks.detection.model import Detections, centred, cornered
from maskllm4v.tasks.detection.settings import MASKED, DetectionSettings, DetectorSettings
from maskllm4v.tasks.shared.named_outputs import NamedOutputs
from maskllm4v.tasks.shared.transformers_folder import CONFIG, build, label_names, num_labels
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.text import few

# Parameters of queries made of noise and of patches left out, which training without transformers' losses has none of.
# Between processes, each trained parameter has to get a gradient.
UNUSED = ("denoising_class_embed.weight", "mask_token")
Outputs = dict[str, Tensor]  # "logits" [B, Q, classes], "boxes" [B, Q, 4]: centre and sides in shares of the image


class Queries:
    """What detectors with queries have in common.

    Args:
        settings: how many detections there are.
        model: which model, from which folder.
    """

    outputs: tuple[str, ...] = ("logits", "pred_boxes")
    paired_layers: tuple[str, ...] = ("*",)

    def __init__(self, settings: DetectionSettings, model: DetectorSettings) -> None:
        assert model.folder is not None
        self.settings, self.model, self.folder = settings, model, Path(model.folder)
        self._labels: list[int] | None = None  # of the data's classes; None: they have the same numbers

    def build(self, settings: DetectorSettings, seed: int, *, pretrained: bool) -> nn.Module:
        """With the folder's weights, or with those drawn from the seed.

        Raises:
            ConfigError, CheckpointError: see :mod:`maskllm4v.tasks.shared.transformers_folder`; or the folder is of a
                model with another number of classes.
        """
        if (count := num_labels(self.folder)) != settings.classes:
            raise ConfigError(f"model.classes is {settings.classes}, but {self.folder / CONFIG} has {count} classes")
        fused = settings.fused_attention
        model = build(settings.name, self.folder, seed, pretrained=pretrained, fused_attention=fused)
        for name, parameter in model.named_parameters():
            if name.endswith(UNUSED):
                parameter.requires_grad_(False)
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
                f"{self.folder / CONFIG}: id2label has no {few(unknown)}, but {data} has; allowed: {few(known)}"
            )
        self._labels = [known.index(name) for name in names]

    def learning_mode(self, model: nn.Module) -> None:
        """The mode that masks are learned in: that of use, without dropout and without further groups of queries."""
        model.eval()

    def exportable(self, model: nn.Module) -> nn.Module:
        return NamedOutputs(model, self.outputs)

    def tokens(self, name: str, shape: torch.Size, batch: AnnotatedBatch) -> Tensor | None:
        """All of them: pictures are squashed to the model's size, not padded."""
        return None

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

    def kept(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """All of them, where queries are learned."""
        return torch.tensor([dense["logits"].shape[:2].numel()] * 2, device=dense["logits"].device)

    def _run(self, model: nn.Module, batch: AnnotatedBatch) -> Any:
        if self.model.name not in MASKED:
            return model(pixel_values=batch.images)
        return model(pixel_values=batch.images, pixel_mask=inside(batch).long())

    def _groups(self, outputs: Outputs) -> int:
        return 1

    def _set_loss(self, logits: Tensor, boxes: Tensor, objects: Targets) -> Tensor:
        """Sum over sets of queries, ``[S, Q, ...]``, of each of which the objects are to be found."""
        raise NotImplementedError

    def _sides(self, batch: AnnotatedBatch) -> Tensor:
        """Width and height in pixels of what boxes are shares of, the picture without its padding; int64 ``[B, 2]``."""
        return batch.valid.flip(1)

    def _targets(self, batch: AnnotatedBatch) -> Targets:
        classes = batch.classes
        if self._labels is not None:
            labels = torch.tensor(self._labels, device=classes.device)
            classes = torch.where(classes == NONE, NONE, labels[classes.clamp(min=0)])
        return Targets(classes, centred(batch.boxes) / self._sides(batch).repeat(1, 2)[:, None])

    def _known(self, scores: Tensor) -> Tensor:
        """Of scores ``[..., labels]`` those of the data's classes, in their order."""
        return scores if self._labels is None else scores[..., self._labels]

    def _detections(self, boxes: Tensor, queries: Tensor, classes: Tensor, scores: Tensor, sides: Tensor) -> Detections:
        chosen = boxes.float().gather(1, queries[..., None].expand(-1, -1, 4))
        return Detections(cornered(chosen) * sides.repeat(1, 2)[:, None], classes, scores)


def inside(batch: AnnotatedBatch) -> Tensor:
    """Where images are, and not padding, bool ``[B, H, W]``."""
    height, width = batch.images.shape[2:]
    down = torch.arange(height, device=batch.valid.device) < batch.valid[:, :1]
    across = torch.arange(width, device=batch.valid.device) < batch.valid[:, 1:]
    return down[:, :, None] & across[:, None]
