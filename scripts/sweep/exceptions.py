"""What is known not to hold, and why: docs/models.md lists the same. An exception that holds by now is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Known:
    """A property that does not hold for a model.

    Attributes:
        model: its name in the sweep.
        property: the property's name.
        what: pattern of all that may be wrong, as in shells.
        why: the reason, as the docs give it.
    """

    model: str
    property: str
    what: str
    why: str


EXCEPTIONS: tuple[Known, ...] = ()


def unexpected(model: str, found: Mapping[str, list[str]]) -> list[str]:
    """Of what a model's sweep has found, what no exception allows; and exceptions of which nothing was found."""
    known = [one for one in EXCEPTIONS if one.model == model]
    faults = [
        f"{name}: {fault}"
        for name, faults in found.items()
        for fault in faults
        if not any(one.property == name and fnmatchcase(fault, one.what) for one in known)
    ]
    return faults + [
        f"{one.property}: holds by now; take it out of scripts/sweep/exceptions.py and docs/models.md"
        for one in known
        if not any(fnmatchcase(fault, one.what) for fault in found.get(one.property, []))
    ]
