"""Names that a table or a row may not have, for something else is called so where results lie or are shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maskllm4v.utils.errors import ConfigError

EXPERIMENTS = "experiments"  # the folder whose files are all known experiments
MARKERS = ("published", "performance", "deployment", "receipts", "reproduced")  # generated blocks of the README
TABLES = (*MARKERS, "benchmarks", "proofs")  # the latter two, as receipts, are folders of reports/
ROWS = ("data", "exports")  # folders of artifacts/


def check_names(table: str, rows: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where a table or a row is called what is something else's name."""
    if table in TABLES:
        raise ValueError(f"table is {table!r}, as something else in reports or README is; taken: {_listed(TABLES)}")
    if taken := [row for row in rows if row in ROWS]:
        raise ValueError(f"rows: {taken[0]!r} is a folder of artifacts that is no row's; taken: {_listed(ROWS)}")


def check_is_free(path: Path, table: str, rows: Mapping[str, Any], read: Callable[[Path], Any]) -> None:
    """That no other experiment makes the table.

    Two files of ``experiments/`` may not. A params file beside that folder may be one of them with other settings; one
    that shares no row with the file of its table is another experiment.

    Args:
        path: the params file.
        table, rows: what it says.
        read: gives what such a file holds, or raises :class:`ConfigError`.

    Raises:
        ConfigError: one does; names the file.
    """
    known = path.resolve().parent.name == EXPERIMENTS
    folder = path.parent if known else path.parent / EXPERIMENTS
    names_it = re.compile(rf"^table\s*:\s*[\"']?{re.escape(table)}[\"']?\s*(#|$)", re.MULTILINE)
    for other in sorted(folder.glob("*.yaml")):
        if other.resolve() == path.resolve() or not names_it.search(other.read_text("utf-8", errors="replace")):
            continue
        try:
            theirs = read(other)["rows"].keys()
        except (ConfigError, TypeError, KeyError, AttributeError):  # whoever reads that file says what is wrong
            continue
        if known or not theirs & rows.keys():
            raise ConfigError(f"{path}: table is {table!r}, which is that of {other}; give it another name")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
