"""Text between markers in README and findings: ``<!-- digits -->`` ... ``<!-- /digits -->``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from maskllm4v.utils.errors import UserError


def splice(text: str, sections: Mapping[str, str], origin: str = "README.md") -> str:
    """Replace what stands between each section's markers; sections without markers are passed over.

    Lines end as that of the opening marker does.

    Raises:
        UserError: an opening marker without its closing one, or twice the same.
    """
    for name, found in spliced(text, sections, origin).items():
        end = "\r\n" if found.startswith("\r\n") else "\n"
        first, last = markers(name)
        body = f"\n{sections[name].rstrip()}\n".replace("\n", end)
        text = text.replace(f"{first}{found}{last}", f"{first}{body}{last}")
    return text


def spliced(text: str, names: Iterable[str], origin: str = "README.md") -> dict[str, str]:
    """What stands between the markers of each section that has some; errors as :func:`splice`."""
    found = {}
    for name in names:
        first, last = markers(name)
        if (text.count(first), text.count(last)) not in ((0, 0), (1, 1)):
            raise UserError(f"{origin}: the markers {first} and {last} have to stand there once each")
        before, _, rest = text.partition(first)
        if last in before:
            raise UserError(f"{origin}: {last} stands before {first}")
        if rest:
            found[name] = rest.partition(last)[0]
    return found


def markers(name: str) -> tuple[str, str]:
    """What a generated section begins and ends with."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"
