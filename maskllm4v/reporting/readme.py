"""Text between markers in README and findings: ``<!-- digits -->`` ... ``<!-- /digits -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from maskllm4v.utils.errors import UserError


def splice(text: str, sections: Mapping[str, str], origin: str = "README.md") -> str:
    """Replace what stands between each section's markers; sections without markers are passed over.

    Raises:
        UserError: an opening marker without its closing one, or twice the same.
    """
    for name, body in sections.items():
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        if (text.count(first), text.count(last)) not in ((0, 0), (1, 1)):
            raise UserError(f"{origin}: the markers {first} and {last} have to stand there once each")
        block = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
        if first in text and not block.search(text):
            raise UserError(f"{origin}: {last} stands before {first}")
        replacement = f"{first}\n{body.rstrip()}\n{last}"
        text = block.sub(lambda _, new=replacement: new, text)  # type: ignore[misc]
    return text
