"""The README's performance section: targets and what was measured, then each benchmark's table.

Everything comes from ``reports/benchmarks/*.json``, which ``make bench`` writes. What was not measured is ``–``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskllm4v.reporting.benchmarks.costs import benchmark
from maskllm4v.reporting.benchmarks.exact_speed import exact_step_table, stages_table
from maskllm4v.reporting.benchmarks.measured import Row, caption, distinct, distinct_rows, find, rows_of
from maskllm4v.reporting.marks import markdown
from maskllm4v.reporting.tables import MISSING, significant

TEXTBOOK, DEFAULT = "textbook", {"cpu": "chunked", "cuda": "triton"}  # backends that "auto" takes for 2:4


MODELS = {"vit_tiny": "ViT-tiny/16", "vit_base": "ViT-B/16", "vit_base_128": "ViT-B/16"}  # of train_step


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        what: in words.
        goal: as it is shown.
        source: the benchmark's file, without suffix.
        show: what was measured, from that file; None if it is not in there.
    """

    what: str
    goal: str
    source: str
    show: Callable[[Row], str | None]

    def cells(self, reports: Path) -> list[str]:
        """The line of the table."""
        found = benchmark(self.source, reports)
        return [self.what, (found and self.show(found)) or MISSING, self.goal]


def _number(section: str, column: str, unit: str, **where: Any) -> Callable[[Row], str | None]:
    """Shows a column of the row that has these values in others."""

    def show(found: Row) -> str | None:
        row = find(rows_of(found, section), where)
        return None if row is None else f"{significant(row[column], 3)}{unit}"

    return show


def _also_compiled(section: str, column: str, key: str, **where: Any) -> Callable[[Row], str | None]:
    """Shows a ratio of what runs by default, and in brackets that under ``torch.compile``."""
    plain, compiled = {"candidate": (DEFAULT["cpu"], "compiled"), "variant": ("ours", "ours_compiled")}[key]

    def show(found: Row) -> str | None:
        values = [_number(section, column, "×", **where, **{key: name})(found) for name in (plain, compiled)]
        return values[0] if None in values else f"{values[0]} (torch.compile: {values[1]})"

    return show


def _pruning(method: str) -> Callable[[Row], str | None]:
    """Shows how much faster a whole model is pruned, and its layers alone where there is more to do."""

    def show(found: Row) -> str | None:
        where = {"method": method, "images": 128}
        rows = [find(rows_of(found, "models"), {**where, "candidate": name}) for name in (TEXTBOOK, "ours")]
        if rows[0] is None or rows[1] is None:
            return None
        text, alone = f"{rows[1]['speedup']:.2f}×", rows[0]["solving_s"] / rows[1]["solving_s"]
        return text if method == "magnitude" else f"{text} (calibration aside: {alone:.2f}×)"

    return show


def _agreement(found: Row) -> str | None:
    shares = [row[key] for row in rows_of(found, "agreement") for key in ("sparsegpt", "sparsegpt, update")]
    return f"{significant(100 * min(shares), 5)} %" if shares else None


_GPU, _COLUMNS = "H200-class GPU", "ViT-B/16, 128 images, CPU, column loop's time to ours"
TARGETS = (
    Target(
        "Mask, forward and backward, one CPU thread, textbook's time to ours",
        "≥ 3.5×",
        "mask_op",
        _also_compiled("layer", "speedup", "candidate", tau=1.0, threads=1),
    ),
    Target(
        "Kept for backward beyond dense, a weight",
        "≤ 4 B",
        "mask_op",
        _number("memory", "saved_bytes", " B", candidate=DEFAULT["cpu"]),
    ),
    Target(
        "Whole step, ViT-tiny, fp32, batch 8, CPU, to dense",
        "≤ 1.30×",
        "train_step",
        _also_compiled("steps", "ratio", "variant", model="vit_tiny"),
    ),
    Target(
        "Whole step, ViT-B/16, bf16, batch 8, CPU, to dense",
        "≤ 1.8×",
        "train_step",
        _also_compiled("steps", "ratio", "variant", model="vit_base"),
    ),
    Target(
        f"Whole step, ViT-B/16, bf16, batch 128, {_GPU}, to dense",
        "≤ 1.05×",
        "train_step_cuda",
        _number("steps", "ratio", "×", model="vit_base_128", variant="ours"),
    ),
    Target(f"SparseGPT with update, {_COLUMNS}", "≥ 1.6×", "oneshot", _pruning("sparsegpt, update")),
    Target(f"SparseGPT without update, {_COLUMNS}", "≥ 4×", "oneshot", _pruning("sparsegpt")),
    Target("Magnitude, ViT-B/16, CPU, textbook's time to ours", "≥ 5×", "oneshot", _pruning("magnitude")),
    Target(
        f"SparseGPT with update, ViT-B/16, 128 images, {_GPU}",
        "≤ 15 s",
        "oneshot_cuda",
        _number("models", "s", " s", method="sparsegpt, update", images=128, candidate="ours"),
    ),
    Target(
        "Groups for which SparseGPT chooses as the column loop does, given Hessian and factor, least of all layers",
        "≥ 99.9 %",
        "oneshot",
        _agreement,
    ),
)


def performance_markdown(reports: Path) -> str:
    """The section, between its markers."""
    parts = [markdown(["What", "Measured", "Target"], [target.cells(reports) for target in TARGETS])]
    tables = (
        ("mask_op", mask_table),
        ("train_step", step_table),
        ("exact_step", exact_step_table),
        ("commits", stages_table),
        ("oneshot", pruning_table),
    )
    for source, table in tables:
        for name in (source, f"{source}_cuda"):
            if (found := benchmark(name, reports)) is not None:
                parts.append(table(found) + "\n" + caption(found))
    return "\n".join(parts)


def mask_table(found: Row) -> str:
    """One layer: a line a setting, a column a candidate."""
    layer = rows_of(found, "layer")
    names = distinct(layer, "candidate")
    lines: list[list[str]] = []

    def add(label: str, rows: Iterable[Row], cell: Any) -> None:
        by_name = {row["candidate"]: row for row in rows}
        lines.append([label, *(cell(by_name[name]) if name in by_name else MISSING for name in names)])

    for threads, tau in dict.fromkeys((row["threads"], row["tau"]) for row in layer):
        label = f"2:4, τ = {tau:g}, {threads} thread{'s' if threads != 1 else ''}"
        add(label, [row for row in layer if (row["threads"], row["tau"]) == (threads, tau)], _time)
    for row in distinct_rows(rows_of(found, "width"), "out")[1:]:  # the first ones stand above
        add(f"2:4, {row['out']}×{row['in']}", [r for r in rows_of(found, "width") if r["out"] == row["out"]], _time)
    for pattern in distinct(rows_of(found, "patterns"), "pattern")[1:]:
        add(pattern, [row for row in rows_of(found, "patterns") if row["pattern"] == pattern], _time)
    memory = rows_of(found, "memory")
    add("kept for backward, a weight", memory, lambda row: f"{significant(row['saved_bytes'], 3)} B")
    add("most allocated, a weight", memory, lambda row: f"{significant(row['peak_bytes'], 3)} B")
    roofline = rows_of(found, "roofline")
    for threads in distinct(roofline, "threads"):
        rows = [row for row in roofline if row["threads"] == threads and row["tau"] == 1]
        add(
            f"share of the roofline, {threads} thread{'s' if threads != 1 else ''}",
            rows,
            lambda row: f"{significant(100 * row['share'])} %",
        )
    return markdown(["One layer's mask operation", *names], lines)


def step_table(found: Row) -> str:
    """Whole steps: a line a model, a column a variant."""
    rows = rows_of(found, "steps")
    variants = distinct(rows, "variant")
    lines = []
    for first in distinct_rows(rows, "model"):
        cells = [f"{MODELS.get(first['model'], first['model'])}, {first['precision']}, batch {first['batch']}"]
        for variant in variants:
            row = find(rows, {"model": first["model"], "variant": variant})
            cells.append(
                MISSING
                if row is None
                else f"{significant(row['ms'], 3)} ms ({row['ratio']:.2f}×), {significant(row['peak_mb'], 3)} MiB"
            )
        lines.append(cells)
        shares = [find(rows_of(found, "roofline"), {"model": first["model"], "variant": name}) for name in variants]
        if any(shares):
            lines.append(["share of the roofline", *map(_share, shares)])
    return markdown(["Whole step", *(variant.replace("_", ", ") for variant in variants)], lines)


def pruning_table(found: Row) -> str:
    """One-shot pruning: a line a method; the whole model, and its first layer alone."""
    models, layers = rows_of(found, "models"), rows_of(found, "layers")[:1]
    headers, lines = ["One-shot pruning"], list[list[str]]()
    if models:
        headers += [f"{models[0]['images']} images, {name}" for name in (TEXTBOOK, "ours")]
    if layers:
        headers += [f"{layers[0]['out']}×{layers[0]['in']} layer, {name}" for name in (TEXTBOOK, "ours")]
    shares = rows_of(found, "roofline")
    headers += ["whole model, ours: share of the roofline"] if shares else []
    for method in distinct(models, "method"):
        cells = [str(method)]
        for section, unit, where in [("models", "s", {}), *(("layers", "ms", {"layer": r["layer"]}) for r in layers)]:
            for name in (TEXTBOOK, "ours"):
                row = find(rows_of(found, section), {**where, "method": method, "candidate": name})
                cells.append(MISSING if row is None else _time(row, unit))
        if shares:
            cells.append(_share(find(shares, {"method": method})))
        lines.append(cells)
    return markdown(headers, lines)


def _share(row: Row | None) -> str:
    return MISSING if row is None else f"{significant(100 * row['share'], 2)} %"


def _time(row: Row, unit: str = "ms") -> str:
    text = f"{significant(row[unit], 3)} {unit}"
    return text if row["candidate"] == TEXTBOOK else f"{text} ({row['speedup']:.2f}×)"
