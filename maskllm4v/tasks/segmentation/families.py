"""What differs between segmenters: what they give, what it says about pixels, and what they are trained by."""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.data.annotated import IGNORED, AnnotatedBatch
from maskllm4v.tasks.segmentation.folders import build_from_folder
from maskllm4v.tasks.segmentation.model import build_segmenter
from maskllm4v.tasks.segmentation.queries import QueryFamily
from maskllm4v.tasks.segmentation.settings import SAM, SegmenterSettings
from maskllm4v.tasks.shared.named_outputs import NamedOutputs


class SegmentationFamily(Protocol):
    """Models with outputs of one kind. Losses are sums, to be divided by the :meth:`weight` of all that they sum over.

    Attributes:
        outputs: the names of what the model gives, for export.
    """

    outputs: tuple[str, ...]

    def build(self, settings: SegmenterSettings, seed: int, *, pretrained: bool) -> nn.Module:
        """The model in evaluation mode, its weights drawn from the seed where none are loaded."""

    def exportable(self, model: nn.Module) -> nn.Module:
        """A module that holds the model and gives nothing but :attr:`outputs` of images ``[B, C, H, W]``."""

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Any:
        """Run the model on a batch."""

    def logits(self, outputs: Any, size: tuple[int, int]) -> Tensor:
        """Scores ``[B, K, H, W]`` of classes; the largest one is what the model finds.

        Args:
            outputs: of :meth:`forward`.
            size: H and W in pixels.
        """

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        """What the batch's losses have to be divided by, a scalar."""

    def loss(self, outputs: Any, batch: AnnotatedBatch) -> Tensor:
        """Training loss, a scalar sum."""

    def distillation_loss(self, outputs: Any, teacher: Any, temperature: float, batch: AnnotatedBatch) -> Tensor:
        """How far the outputs are from the dense model's, a scalar sum."""


class TokenFamily:
    """A backbone's tokens and one linear layer, or any other model that gives logits ``[B, K, h, w]`` of pixels."""

    outputs: tuple[str, ...] = ("logits",)

    def build(self, settings: SegmenterSettings, seed: int, *, pretrained: bool) -> nn.Module:
        return build_segmenter(settings, seed, pretrained=pretrained)

    def exportable(self, model: nn.Module) -> nn.Module:
        return model

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Tensor:
        logits: Tensor = model(batch.images)
        return logits

    def logits(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        if outputs.shape[2:] == size:
            return outputs
        return F.interpolate(outputs.float(), size, mode="bilinear", align_corners=False)

    def weight(self, batch: AnnotatedBatch) -> Tensor:
        """How many pixels have a class."""
        return (batch.masks != IGNORED).sum()

    def loss(self, outputs: Tensor, batch: AnnotatedBatch) -> Tensor:
        """Cross-entropy of the pixels that have a class."""
        logits = self.logits(outputs.float(), batch.size)
        return F.cross_entropy(logits, batch.masks, ignore_index=IGNORED, reduction="sum")

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float, batch: AnnotatedBatch) -> Tensor:
        """T²·KL(teacher ‖ student) at temperature T (Hinton et al. 2015), of the pixels that have a class."""
        student, target = (
            F.log_softmax(self.logits(found.float(), batch.size) / temperature, 1) for found in (outputs, teacher)
        )
        divergence = F.kl_div(student, target, log_target=True, reduction="none").sum(1)
        return temperature**2 * (divergence * (batch.masks != IGNORED)).sum()


class SamFamily(TokenFamily):
    """SAM's image encoder and one linear layer."""

    def build(self, settings: SegmenterSettings, seed: int, *, pretrained: bool) -> nn.Module:
        return build_from_folder(settings, seed, pretrained=pretrained)


class PixelFamily(SamFamily):
    """Models of transformers that give ``logits`` ``[B, K, h, w]``, of any size: SegFormer, DPT, UPerNet."""

    def exportable(self, model: nn.Module) -> nn.Module:
        return NamedOutputs(model, self.outputs)

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Tensor:
        logits: Tensor = model(pixel_values=batch.images).logits
        return logits


def family_of(settings: SegmenterSettings) -> SegmentationFamily:
    """That of the model which some settings name."""
    if not settings.of_transformers:
        return TokenFamily()
    if settings.name == SAM:
        return SamFamily()
    return QueryFamily() if settings.name.endswith("ForUniversalSegmentation") else PixelFamily()
