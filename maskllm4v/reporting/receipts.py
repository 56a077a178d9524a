"""On which CPUs tables were reproduced: what README and captions claim, from ``reports/receipts/``.

A receipt counts for today's results if it was compared with them; others are history. Only results tell the two
apart, not what is rendered from them, so rendering a receipt never makes it history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.receipts.digits import ordinal
from maskllm4v.receipts.model import Receipt
from maskllm4v.receipts.rows import results_here
from maskllm4v.receipts.store import read_receipts
from maskllm4v.reporting.marks import code, escaped, markdown
from maskllm4v.reporting.names import short_names
from maskllm4v.reporting.tables import MISSING

LEGEND = (
    "Rows that came out as committed, to the last bit. "
    "Every stage: data, trainings, pruning, updates, evaluations, exports. "
    "A few steps: of every kind of stage, on an emulated CPU, compared with the same steps on a real one."
)
WHERE = "[Where that was tried](#how-exact-is-exact)"
NONE = "No receipts yet: nobody has said where the tables were reproduced."


@dataclass(frozen=True)
class Filed:
    """A receipt of a table that is made here; ``current``: it was compared with today's results."""

    receipt: Receipt
    experiment: Experiment
    current: bool

    @property
    def reproduced(self) -> bool:
        """Whether it is evidence that all of a table, or of a shortened chain, came out as it is today."""
        return self.current and self.receipt.agrees and self.receipt.complete


def filed_receipts(experiments: Mapping[str, Experiment], reports: Path) -> list[Filed]:
    """The receipts of exact tables: today's first, and whole chains before shortened ones, then by name."""
    found, today = [], {}
    for receipt in read_receipts(reports).values():
        experiment = experiments.get(receipt.table)
        if experiment is not None and experiment.exact:
            if receipt.table not in today:
                today[receipt.table] = results_here(experiment, reports)
            found.append(Filed(receipt, experiment, receipt.results == today[receipt.table]))
    return sorted(found, key=lambda one: (not one.current, one.receipt.chain != "full"))


def receipts_markdown(experiments: Mapping[str, Experiment], reports: Path) -> str:
    """The README's table of CPUs, and below it what differed where."""
    filed = filed_receipts(experiments, reports)
    if not filed:
        return f"{NONE}\n"
    tables = [table for table, experiment in experiments.items() if experiment.exact]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for one in filed:
        receipt = one.receipt
        line = lines.setdefault((receipt.machine, _what_ran(receipt), _compared_with(one)), {})
        line[receipt.table] = f"{len(receipt.named('equal'))} of {len(receipt.rows)}"
    rows = [[*key, *(cells.get(table, MISSING) for table in tables)] for key, cells in lines.items()]
    text = markdown(["CPU", "What ran", "Compared with", *tables], rows)
    return f"{text}\n*{' '.join([LEGEND, *filter(None, map(_differing, filed))])}*\n"


def reproduced_markdown(experiments: Mapping[str, Experiment], reports: Path) -> str:
    """The claim at the head of the README: which tables were reproduced on which CPUs."""
    tables: dict[str, list[str]] = {}
    filed = [one for one in filed_receipts(experiments, reports) if one.reproduced]
    for one in filed:
        if one.receipt.chain == "full":
            tables.setdefault(one.receipt.machine, []).append(code(one.receipt.table))
    if not tables:
        return f"{WHERE}.\n"
    places = "; ".join(f"{_listed(names)} on {escaped(machine)}" for machine, names in tables.items())
    return f"So far that was reproduced, to the last bit: {places}. {WHERE}.\n"


def claim(experiment: Experiment, reports: Path) -> str:
    """What a caption may say on where a table was reproduced, as half a sentence; empty if nowhere."""
    filed = [one.receipt for one in filed_receipts({experiment.table: experiment}, reports) if one.reproduced]
    whole = list(dict.fromkeys(receipt.machine for receipt in filed if receipt.chain == "full"))
    shortened = list(dict.fromkeys(receipt.machine for receipt in filed if receipt.chain == "shortened"))
    text = f"reproduced to the last bit on {_listed(whole)}" if whole else ""
    if shortened:
        text += "; shortened to a few steps, also" if whole else "reproduced to the last bit, shortened to a few steps,"
        text += f" on {_listed(shortened)}"
    return text


def _what_ran(receipt: Receipt) -> str:
    if receipt.chain == "shortened":
        return "a few steps"
    return "every stage" if receipt.complete else "all but evaluations of equal weights"


def _compared_with(one: Filed) -> str:
    return "today's results" if one.current else f"older results ({(one.receipt.commit or '')[:7]})"


def _differing(one: Filed) -> str:
    """The rows of a receipt that differ, as a sentence."""
    receipt = one.receipt
    rows = receipt.named("differs")
    if not rows:
        return ""
    labels = short_names(receipt.rows)
    digits = [found.digit for row in rows for found in receipt.rows[row].differences]
    start = f", from the {ordinal(min(digits))} digit on" if digits else ""
    names = _listed([code(labels[row]) for row in rows])
    return f"{escaped(receipt.machine)}, {receipt.table}, {_compared_with(one)}: {names} came out different{start}."


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
