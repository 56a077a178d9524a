"""A receipt in words: the verdict that ``make repro`` ends with."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import get_args

from maskllm4v.receipts.digits import ordinal
from maskllm4v.receipts.model import Difference, Receipt, Row, Verdict

SHOWN = 12  # rows that are listed one by one
GOOD, BAD, NEAR, OPEN = "✔", "✘", "≈", "–"


def verdict(receipt: Receipt, width: int = 80) -> list[str]:
    """What came out, in lines: the verdict first, then where and how long, what differs, warnings, what to do next.

    Args:
        receipt: of this machine.
        width: columns that the terminal has.
    """
    mark, headline = summary(receipt)
    blocks = [[*wrapped(f"{mark} {receipt.table}: {headline}", width), *wrapped(f"  on {_where(receipt)}", width)]]
    told = [row for row, found in receipt.rows.items() if found.verdict in ("differs", "other settings", "not made")]
    if len(told) < len(receipt.rows) or receipt.named("differs"):  # or the headline says it all
        lines = [told_row(row, receipt.rows[row]) for row in told]
        blocks.append(table_lines(lines, ("committed", "here")))
    notes = [f"note: {note}" for note in _not_run(receipt)] + [f"warning: {warning}" for warning in receipt.warnings]
    blocks.append([line for note in notes for line in wrapped(note, width)])
    return joined([*blocks, _next(receipt)])


def summary(receipt: Receipt) -> tuple[str, str]:
    """A mark, and the verdict as a sentence without its full stop."""
    total = len(receipt.rows)
    counts = {verdict: len(receipt.named(verdict)) for verdict in get_args(Verdict)}
    made = total - counts["not made"]
    everything = f"all {total} rows are" if total > 1 else "the only row is"
    if not made:
        return OPEN, "no row is made yet"
    if counts["not committed"] == made:
        found = f"{made} of {total} rows {'is' if made == 1 else 'are'} made"
        known = "this table is not committed yet" if receipt.commit else "there is nothing to compare with"
        return OPEN, f"{found}; {known}"
    if receipt.agrees:
        if receipt.chain == "full" and not any(row.computed for row in receipt.rows.values()):
            return OPEN, f"{everything} as committed, but none was computed on this machine"
        theirs = "those on a real CPU" if receipt.chain == "shortened" else "the committed ones"
        return GOOD, f"{everything} equal to {theirs}, to the last bit"
    recording = "" if receipt.exact else ", as is expected of a recording (exact: false): compare within error bars"
    said = {  # for one row, for several
        "differs": (f"differs from the committed one{recording}", f"differ from the committed ones{recording}"),
        "other settings": ("has other settings than the committed one", "have other settings than the committed ones"),
        "not made": ("is not made yet", "are not made yet"),
        "not committed": ("is not committed yet", "are not committed yet"),
        "equal": ("is equal", "are equal"),
    }
    parts = [
        f"{counts[v]} of {total} rows {one if counts[v] == 1 else several}"
        for v, (one, several) in said.items()
        if counts[v]
    ]
    mark = OPEN if not counts["differs"] else BAD if receipt.exact else NEAR
    return mark, "; ".join(parts)


Told = tuple[str, Difference | str, int]  # a row, what to say of it, and how many other metrics differ


def told_row(name: str, row: Row) -> Told:
    """A row with the difference that counts most, or in words."""
    if row.verdict != "differs":
        return name, row.verdict, 0
    if row.differences:
        return name, min(row.differences, key=lambda found: found.digit), len(row.differences) - 1
    found = [_what(name, differing) for differing in row.differing]
    shown = ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
    return name, f"metrics equal; not equal: {shown}" if found else "other results", 0


def table_lines(rows: Sequence[Told], sides: tuple[str, str]) -> list[str]:
    """Rows that differ, a line each: from which digit on, in which metric, both values; ``sides``: what these are."""
    cells = []
    for row, what, more in rows[:SHOWN]:
        if isinstance(what, str):
            cells.append([row, what])
        else:
            values = [f"{what.metric}/seed{what.seed}", str(what.committed), str(what.here)]
            cells.append([row, ordinal(what.digit), *values, f"and {more} more" if more else ""])
    if any(len(line) > 2 for line in cells):
        cells.insert(0, ["row", "from digit", "metric", *sides, ""])
    full = [line for line in cells if len(line) > 2]
    widths = [max(len(line[0]) for line in cells)] if cells else []
    widths += [max(map(len, column)) for column in list(zip(*full, strict=True))[1:]]
    right = range(3, 5)  # columns with values
    lines = [
        "  ".join(
            text if len(line) == 2 and i == 1 else text.rjust(widths[i]) if i in right else text.ljust(widths[i])
            for i, text in enumerate(line)
        )
        for line in cells
    ]
    more_rows = [f"and {len(rows) - SHOWN} more rows"] if len(rows) > SHOWN else []
    return [f"  {line}".rstrip() for line in [*lines, *more_rows]]


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, indented from the second one on."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def joined(blocks: Sequence[Sequence[str]]) -> list[str]:
    """Blocks of lines with an empty line between them; empty ones are left out."""
    lines: list[str] = []
    for block in blocks:
        if block:
            lines += ["", *block] if lines else block
    return lines


def duration(seconds: float) -> str:
    """``8 s``, ``10 min 12 s``, ``2 h 3 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _where(receipt: Receipt) -> str:
    found = receipt.machine
    if receipt.cores:
        found += f", {receipt.cores} core{'s' if receipt.cores > 1 else ''}"
    if receipt.seconds is not None:
        found += f", in {duration(receipt.seconds)}"
    if receipt.stages is not None:
        ran = f"{receipt.stages} stage{'s' if receipt.stages != 1 else ''} run"
        found += f" ({ran if receipt.stages else 'nothing had to run: DVC found everything made'})"
    return found


def _not_run(receipt: Receipt) -> list[str]:
    """Rows that are there without having been computed or measured on this machine, in words."""
    made = [row for row in receipt.rows.values() if row.verdict != "not made"]
    if receipt.chain != "full" or not any(row.computed for row in made):
        return []
    found, total = [], len(receipt.rows)
    if stored := sum(not row.computed for row in made):
        found.append(f"{stored} of {total} rows were not computed on this machine: DVC found them made")
    if skipped := sum(row.computed and not row.measured for row in made):
        found.append(
            f"{skipped} of {total} rows came out equal and so were not measured again; `dvc repro --force` runs all"
        )
    return found


def _what(row: str, differing: str) -> str:
    """What differs, in words, where its name says little."""
    words = {f"artifacts/{row}": "weights or masks", f"artifacts/exports/{row}": "exported files"}
    name, _, keys = differing.removeprefix("evaluation/").partition(": ")
    return words.get(differing, f"{name} ({keys})" if keys else name)


def _next(receipt: Receipt) -> list[str]:
    """What to do now."""
    if receipt.chain == "shortened":
        return []
    table = receipt.table
    steps = {
        "make ui": "compare the runs in MLflow",
        f"reports/{table}/index.html": "open the table's page",
        f"receipt-{table}.json": "attach it to a bug report",
    }
    if summary(receipt)[0] == BAD:
        steps = dict(reversed(steps.items()))
    if len(receipt.named("not made")) == len(receipt.rows):
        steps = {"make repro": "make the table"}
    width = max(map(len, steps))
    return [f"{'next:' if i == 0 else '':5} {step:{width}}  {why}" for i, (step, why) in enumerate(steps.items())]
