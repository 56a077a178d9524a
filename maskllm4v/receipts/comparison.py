"""Two receipts side by side: which rows are equal, and what of the machines is not."""

from __future__ import annotations

from collections.abc import Mapping

from maskllm4v.receipts.digits import metric_differences
from maskllm4v.receipts.model import Receipt, Row
from maskllm4v.receipts.text import BAD, GOOD, OPEN, Told, joined, table_lines, wrapped
from maskllm4v.utils.errors import UserError

SIDES = ("A", "B")


def comparison(names: tuple[str, str], receipts: tuple[Receipt, Receipt], width: int = 80) -> list[str]:
    """Two receipts of one table, in lines.

    Args:
        names: what to call them.
        receipts: the two.
        width: columns that the terminal has.

    Raises:
        UserError: they are of two tables, or one is of a shortened chain.
    """
    one, other = receipts
    for what in ("table", "chain"):
        if getattr(one, what) != getattr(other, what):
            found = f"{getattr(one, what)!r} and {getattr(other, what)!r}"
            raise UserError(f"{names[0]} and {names[1]} cannot be compared: their {what}s are {found}")
    blocks = [[f"{side} {name}: {receipt.machine}" for side, name, receipt in zip(SIDES, names, receipts, strict=True)]]
    told = differing_rows(one.rows, other.rows)
    total = len({row for receipt in receipts for row, found in receipt.rows.items() if found.here})
    if not total:
        blocks.append([f"{OPEN} {one.table}: no row is made in A or B"])
    elif told:
        differ = "differs" if len(told) == 1 else "differ"
        text = f"{BAD} {one.table}: {len(told)} of {total} rows {differ}, {total - len(told)} equal"
        blocks += [wrapped(text, width), table_lines(told, SIDES)]
    else:
        blocks.append([f"{GOOD} {one.table}: all {total} rows are equal in A and B, to the last bit"])
    blocks.append([line for text in _about(one, other) for line in wrapped(text, width)])
    return joined(blocks)


def differing_rows(one: Mapping[str, Row], other: Mapping[str, Row]) -> list[Told]:
    """The rows that differ between two receipts, each with the metric that counts most or in words."""
    found: list[Told] = []
    for row in [*one, *(row for row in other if row not in one)]:
        first, second = one.get(row), other.get(row)
        missing = [side for side, there in zip(SIDES, (first, second), strict=True) if there is None or not there.here]
        if len(missing) == 1:
            found.append((row, f"not made in {missing[0]}", 0))
        elif not missing and first and second and (told := _told(row, first, second)):
            found.append(told)
    return found


def _told(name: str, first: Row, second: Row) -> Told | None:
    """How a row differs, or None if it is equal."""
    if differences := metric_differences(first.metrics, second.metrics):
        return name, min(differences, key=lambda difference: difference.digit), len(differences) - 1
    folders = first.artifacts.keys() & second.artifacts.keys()
    weights = any(first.artifacts[folder] != second.artifacts[folder] for folder in folders)
    if first.here == second.here and not weights:
        return None
    which = "weights, masks or exports" if weights else "other files"
    return name, f"metrics equal; not equal: {which}" if first.metrics else "other results", 0


def _about(one: Receipt, other: Receipt) -> list[str]:
    """What of commit, machine and environment differs, a line each."""
    locked = {name: found[1] for receipt in (one, other) for name, found in receipt.unlocked.items()}
    ours, theirs = (_facts(receipt, locked) for receipt in (one, other))
    names = [*ours, *(name for name in theirs if name not in ours)]
    pairs = ((name, ours.get(name, "not set"), theirs.get(name, "not set")) for name in names)
    return [f"{name}: {first} in A, {second} in B" for name, first, second in pairs if first != second]


def _facts(receipt: Receipt, locked: Mapping[str, str]) -> dict[str, str]:
    """``locked``: releases of packages that another receipt has otherwise."""
    here = {name: found for name, (found, _) in receipt.unlocked.items()}
    changed = " with changes" if receipt.clean is False else ""
    return {
        "commit": f"{receipt.commit[:12]}{changed}" if receipt.commit else "none",
        "committed results": (receipt.results or "none")[:12],
        "CPU": f"{receipt.machine}{'' if receipt.cpu.stepping is None else f', stepping {receipt.cpu.stepping}'}",
        "system": receipt.system,
        "Python": receipt.python,
        "maskllm4v": receipt.package,
        **{name: found or "missing" for name, found in ({**locked, **receipt.versions, **here}).items()},
        **receipt.settings,
    }
