"""Parts of messages: the first few of many names, and what somebody else's error says."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHOWN = 3


def plain(text: str) -> str:
    """A text from outside as it may be shown anywhere: on one line, without what terminals or XML take for commands.

    Line ends and tabs are spaces; other control characters, marks that turn the direction of writing, halves of
    characters and U+FFFE and U+FFFF, which no character is, are U+FFFD.
    """
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def one_line(error: BaseException) -> str:
    """What an error says, or its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def few(names: Sequence[str], of: str = "", *, shown: int = SHOWN, quoted: bool = True) -> str:
    """``'a', 'b', 'c' and 4 more``, empty without names.

    Args:
        names: of which so many as ``shown`` are told.
        of: a noun to go before them, in singular or plural: ``layers 'a' and 'b'``.
        quoted: in quotation marks.
    """
    if not names:
        return ""
    told = [repr(name) if quoted else name for name in names[:shown]]
    if (more := len(names) - len(told)) > 0:
        told.append(f"{more:,} more")
    listed = " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))
    return f"{of}{'s' if len(names) > 1 else ''} {listed}" if of else listed
