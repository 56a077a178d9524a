"""What every section of ``params.yaml`` is made of: types of values, and the class that sections are derived from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from maskllm4v.utils.text import plain

# A name becomes part of file names, which may have 255 bytes.
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]
Line = Annotated[str, AfterValidator(plain)]  # to be shown: line ends are spaces
Pattern = Annotated[str, Field(pattern=r"^[0-9]{1,9}:[0-9]{1,9}$")]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what scikit-learn takes
# YAML has lists only, so a list may stand for a tuple; its parts are as strict as everything else.
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
FirstLast = Annotated[tuple[Positive, Positive], Field(strict=False)]

KIND = "name"  # tells one kind of a section from another: written down even where it has a default


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def defaults(self) -> dict[str, Any]:
        """What settings are unless they are given, by name; those that must be given are missing."""
        fields = type(self).model_fields.items()
        return {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}

    def beyond_defaults(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as plain values. Validated again, they give the same section.

        That holds for sections, not for a whole ``Experiment``, whose rows inherit from ``learning``.

        What has no default is always among them, and so is the key that names a section's kind. A section inside that
        equals its default is not; one that does not, but whose own settings are all at their defaults, is ``{}``.
        """
        defaults, plain = self.defaults(), self.model_dump(mode="json")
        given = {name: value for name, value in self if name == KIND or defaults.get(name, _ABSENT) != value}
        return {name: _shortened(value, plain[name]) for name, value in given.items()}


_ABSENT = object()


def _shortened(value: Any, plain: Any) -> Any:
    """A value as :meth:`Settings.beyond_defaults` has it; ``plain``: the same one with all defaults."""
    if isinstance(value, Settings):
        return value.beyond_defaults()
    if isinstance(value, Mapping):
        return {key: _shortened(one, plain[key]) for key, one in zip(plain, value.values(), strict=True)}
    if isinstance(value, list | tuple):
        return [_shortened(one, other) for one, other in zip(value, plain, strict=True)]
    return plain
