"""Whether a model and annotated images go together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.text import few

GENERIC = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody has named


def class_places(names: Sequence[str], count: int, known: Mapping[int, str] | None = None, *, data: str) -> list[int]:
    """The model's class of each class of the data.

    Args:
        names: the data's, in the order of their numbers.
        count: how many classes the model has.
        known: their names by number, if the model says them (``id2label`` of transformers); then names decide, and the
            model may have more (DETR's has 91 for COCO's 80). Otherwise numbers do, and there have to be as many.
        data: the source's name, for messages.

    Raises:
        ConfigError: a name that the model does not know, or two of its classes have; or another number of classes.
    """
    if known is None or all(GENERIC.fullmatch(name) for name in known.values()):
        if count != len(names):
            raise ConfigError(f"model.classes is {count}, but {data} has {len(names)} classes")
        return list(range(count))
    places: dict[str, list[int]] = {}
    for number, name in known.items():
        places.setdefault(name, []).append(int(number))
    if strange := [name for name in names if name not in places]:
        free = [name for name in places if name not in names]
        raise ConfigError(
            f"{data} has {few(strange, 'class name')}, unknown to the model; "
            f"the model's that {data} has not: {few(free, shown=10) or '(none)'}"
        )
    if doubtful := [name for name in names if len(places[name]) > 1]:
        raise ConfigError(f"the model has several classes called {few(doubtful)}")
    return [places[name][0] for name in names]


def check_divisible(size: Sequence[int], patch: int | Sequence[int], model: str) -> None:
    """Raise :class:`ConfigError` where patches do not cover images exactly.

    Args:
        size: height and width of the images.
        patch: of the patches; one number for squares.
        model: its name, for the message.
    """
    patches = [patch, patch] if isinstance(patch, int) else list(patch)
    for side, own, name in zip(size, patches, ("height", "width"), strict=True):
        if side % own:
            near = sorted({max(own, side // own * own), (side // own + 1) * own})
            raise ConfigError(
                f"model.input.img_size: a {name} of {side} pixels is not divisible by the patches of {model}, "
                f"{own} pixels; near: {' or '.join(map(str, near))}"
            )
