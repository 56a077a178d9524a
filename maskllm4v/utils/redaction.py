"""User names and passwords in addresses, ``http://user:password@host``, which nothing may print, log or write down."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

HIDDEN = "***"
# Up to the last @, if there is one before the path, or something behind a colon that is no port: a password may have a
# slash in it, although that is no address then.
_ADDRESS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)(?=[^\s/?#]*@|[^\s/@:]*:(?!\d+[/?#])\S*@)\S*@")


def redacted(text: str) -> str:
    """A text in which ``***`` stands for whatever user information its addresses hold."""
    return _ADDRESS.sub(rf"\1{HIDDEN}@", text)


def redact_all() -> None:
    """Have tracebacks and what this process logs from now on redacted."""
    sys.excepthook = _print_redacted
    if logging.getLogRecordFactory() is not _record:
        logging.setLogRecordFactory(_record)


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _record(*arguments: object, **named: object) -> logging.LogRecord:
    found = logging.LogRecord(*arguments, **named)  # type: ignore[arg-type]
    found.msg, found.args = redacted(found.getMessage()), ()
    if found.exc_info and found.exc_info[0] is not None:  # formatters take this text instead
        found.exc_text = redacted("".join(traceback.format_exception(*found.exc_info)).rstrip())
    return found
