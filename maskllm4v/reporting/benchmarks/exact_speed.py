"""What exact runs cost, before and after: a step in its parts, and whole stages at two commits."""

from __future__ import annotations

from maskllm4v.reporting.benchmarks.measured import Row, distinct, find, rows_of
from maskllm4v.reporting.marks import markdown
from maskllm4v.reporting.tables import MISSING, significant

KINDS = {"dense": "dense", "ours": "mask learning", "ours_distilled": "mask learning, self-distilled"}
CANDIDATES = {"before": "before", "products": "NumPy's products", "masks": "joined masks", "now": "both"}


def exact_step_table(found: Row) -> str:
    """A line per kind of training, a column per way to compute it; see :mod:`benchmarks.exact_step`."""
    rows, lines = rows_of(found, "steps"), []
    for kind in distinct(rows, "kind"):
        cells = [KINDS[kind]]
        for candidate in CANDIDATES:
            row = find(rows, {"kind": kind, "candidate": candidate})
            cells.append(MISSING if row is None else f"{significant(row['ms'], 3)} ms ({row['ratio']:.2f}×)")
        lines.append(cells)
    return markdown(["Exact step of digits, one thread", *CANDIDATES.values()], lines)


def stages_table(found: Row) -> str:
    """A line per kind of stage; see :mod:`benchmarks.commits`."""
    lines = []
    for row in rows_of(found, "stages"):
        seconds = (f"{significant(row[key], 3)} s" for key in ("before_s", "after_s"))
        lines.append([row["kind"], str(row["items"]), *seconds, f"{row['ratio']:.2f}×"])
    return markdown(["Stage of digits, processor time", "Stages", "Before", "After", "Ratio"], lines)
