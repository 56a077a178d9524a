"""Receipts that others may see: read with care, and kept in ``reports/receipts/``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from maskllm4v.config import Experiment
from maskllm4v.receipts.build import write_receipt
from maskllm4v.receipts.model import FORMAT, Receipt
from maskllm4v.receipts.rows import results_here
from maskllm4v.utils.determinism import ENVIRONMENT
from maskllm4v.utils.errors import UserError

FOLDER = "receipts"  # in the reports
LARGEST = 4 * 2**20  # bytes; a table of 25 rows takes 40 KB


def read_receipt(path: Path) -> Receipt:
    """A receipt from a file.

    Raises:
        UserError: it is missing, too large, not JSON, of another format, or not a receipt. One line that names it.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > LARGEST:
        raise UserError(f"{path} is not a receipt: it has more than {LARGEST // 2**20} MiB")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a receipt: it is not JSON ({_printable(str(error))})") from error
    if not isinstance(found, dict) or "format" not in found:
        raise UserError(f"{path} is not a receipt: key 'format' is missing")
    if found["format"] != FORMAT:
        raise UserError(f"{path} has format {_printable(repr(found['format']))}; this version reads {FORMAT}")
    try:
        return Receipt.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path} is not a receipt: {_printable(place)}: {_printable(fault['msg'])}") from error


def read_receipts(reports: Path) -> dict[str, Receipt]:
    """All receipts in ``reports/receipts/`` by file name, in the order of their names."""
    return {path.name: read_receipt(path) for path in sorted((reports / FOLDER).glob("*.json"))}


def add_receipt(receipt: Receipt, origin: Path, experiments: Sequence[Experiment], reports: Path) -> Path:
    """Put a receipt into ``reports/receipts/``, without what changes from run to run (cores, seconds, stages).

    Its name is made from table, CPU and emulator, so that the same CPU has one. One that was compared with older
    results than today's is history: it is kept beside the new one if rows differed in it, under a name with ``before``.

    Args:
        receipt: to be added.
        origin: its file, for messages.
        experiments: those of this checkout.
        reports: where results and receipts lie.

    Returns:
        The file that it is in now.

    Raises:
        UserError: it proves nothing, for its tree was unclean, its environment was another, or rows did not run.
    """
    experiment = next((found for found in experiments if found.table == receipt.table), None)
    if experiment is None:
        allowed = ", ".join(found.table for found in experiments if found.exact)
        raise UserError(f"{origin}: no table {receipt.table!r} here; allowed: {allowed}")
    if why := _unfit(receipt, experiment):
        raise UserError(f"{origin} proves nothing: {why}")
    today, folder = results_here(experiment, reports), reports / FOLDER
    target = folder / f"{receipt_name(receipt)}.json"
    if receipt.results != today:
        target = _before(target, receipt)
    elif target.exists() and (old := read_receipt(target)).results != today and not old.agrees:
        write_receipt(_before(target, old), old)
    kept = receipt.model_copy(update={"cores": None, "seconds": None, "stages": None})
    write_receipt(target, kept)
    return target


def receipt_name(receipt: Receipt) -> str:
    """``digits-amd-epyc-25-17`` or ``digits-haswell-6-60-qemu-7-2``."""
    cpu = receipt.cpu
    numbers = [str(number) for number in (cpu.family, cpu.model) if number is not None]
    words = [cpu.name.partition("@")[0], *numbers, receipt.emulator or ""]
    text = re.sub(r"\((r|tm)\)", " ", " ".join(words).lower())
    return f"{receipt.table}-{re.sub(r'[^a-z0-9]+', '-', text).strip('-')}"


def _before(target: Path, receipt: Receipt) -> Path:
    return target.with_stem(f"{target.stem}-before-{(receipt.results or '')[:8]}")


def _unfit(receipt: Receipt, experiment: Experiment) -> str | None:
    """Why a receipt is no evidence for a table's claim, or None."""
    if not experiment.exact or not receipt.exact:
        return f"table {receipt.table!r} is a recording (exact: false), which other machines do not reproduce"
    if receipt.commit is None or receipt.results is None:
        return "its results were not compared with a commit"
    if not receipt.clean:
        return f"the tree differed from commit {receipt.commit[:12]} in code or settings"
    if not receipt.locked:
        names = ", ".join(f"{name} {here}" for name, (here, _) in list(receipt.unlocked.items())[:3])
        return f"it is not from the locked environment ({names or 'no requirements.lock'})"
    if unpinned := [name for name in receipt.settings if name not in ENVIRONMENT]:
        return f"{unpinned[0]} was exported, which the pin does not set"
    if receipt.chain == "shortened":
        return None if receipt.emulator else "its chain was shortened, which counts on emulated CPUs only"
    if differing := set(receipt.rows) ^ set(experiment.rows):
        return f"its rows are not the table's: {', '.join(sorted(differing)[:3])}"
    for row, found in receipt.rows.items():
        if found.verdict not in ("equal", "differs"):
            return (
                f"row {row!r} is {found.verdict}"
                if found.verdict != "other settings"
                else f"row {row!r} has other settings"
            )
        if not found.computed:
            return f"row {row!r} was not computed on that machine; `dvc repro --force` computes all"
    return None


def _printable(text: str) -> str:
    """One line without control characters, of at most 200 letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))[:200]
