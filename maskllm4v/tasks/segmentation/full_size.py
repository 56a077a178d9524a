"""What models find, at the size of the pictures as they are stored, which is what benchmarks score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from maskllm4v.data.annotated import AnnotatedBatch
from maskllm4v.tasks.segmentation.families import SegmentationFamily


class Place(NamedTuple):
    """Images of a batch that are stored with the same size.

    Attributes:
        images: which.
        padded: height and width that they would have with their padding, as it was when the model saw them.
        size: height and width that they have.
    """

    images: slice
    padded: tuple[int, int]
    size: tuple[int, int]


def places(batch: AnnotatedBatch) -> Iterator[Place]:
    """All images at once where they are stored as the model sees them, else one after the other."""
    height, width = batch.images.shape[2:]
    seen, stored = batch.valid.tolist(), batch.sizes.tolist()
    if all(size == [height, width] for size in (*seen, *stored)):
        yield Place(slice(None), (height, width), (height, width))
        return
    for i, ((y, x), (full_y, full_x)) in enumerate(zip(seen, stored, strict=True)):
        # One resizing of everything, of which the padding is then cut off: resizing twice would blur.
        padded = (round(height * full_y / y), round(width * full_x / x))
        yield Place(slice(i, i + 1), padded, (full_y, full_x))


def logits_at(place: Place, family: SegmentationFamily, outputs: Any) -> Tensor:
    """Scores ``[b, K, H, W]`` of the classes of a place's images, of the outputs ``[B, ...]`` of its batch."""
    if isinstance(outputs, Tensor):
        chosen: Any = outputs[place.images]
    else:
        chosen = {name: tensor[place.images] for name, tensor in outputs.items()}
    height, width = place.size
    return family.logits(chosen, place.padded)[..., :height, :width]
