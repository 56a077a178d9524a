"""The README's section on what a folded model saves: bytes on disk, milliseconds at inference.

Sizes come from the manifests of exported rows, ``reports/<table>/runs/<row>/export.json``, and from the benchmark
``inference``; speeds from that alone. What was not measured is ``–``; what is slower than dense is shown as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from maskllm4v.reporting.benchmarks.costs import benchmark, machine
from maskllm4v.reporting.benchmarks.measured import Row, caption, distinct, find, rows_of
from maskllm4v.reporting.marks import code, escaped, markdown
from maskllm4v.reporting.tables import MISSING, significant
from maskllm4v.utils.io import read_json

SOURCES = ("inference_cuda", "inference")
MODELS = {
    "vit_tiny_patch16_224": "ViT-tiny/16",
    "vit_base_patch16_224": "ViT-B/16",
    "vit_large_patch16_224": "ViT-L/16",
    "vit_huge_patch14_224": "ViT-H/14",
}
CANDIDATES = {  # as the benchmark calls them
    "dense": "dense",
    "2:4 zeros": "2:4, zeros in place",
    "torch": "2:4, torch's conversion",
    "ours": "2:4, ours",
    "ours, faster only": "2:4, ours where faster",
}
MODES = {  # likewise
    "eager": "Whole model, eager",
    "graphed": "Whole model, CUDA graph",
    "compiled": "Whole model, torch.compile",
    "onnxruntime": "Whole model, ONNX Runtime",
}
FRONT = "graphed"  # shown at once, for it is the way to run converted models; the others are folded away
PARTS = {"attention": "Attention of one block", "mlp": "MLP of one block"}
MEMORY = "MiB of weights + the most beyond them"
LINE = ("model", "precision", "batch")
DENSE = "dense"
FORMATS, DTYPES = (DENSE, "packed", "mask", "onnx"), ("fp32", "fp16", "bf16", None)


def deployment_markdown(reports: Path) -> str:
    """The section, between its markers; empty if there is nothing to show."""
    measured = {name: found for name in SOURCES if (found := benchmark(name, reports)) is not None}
    parts = [size_table([*exported(reports), *benchmarked(measured.values())])]
    for found in measured.values():
        latency = latency_tables(found)
        rest = [*(text for mode, text in latency.items() if mode != FRONT), *part_tables(found), memory_table(found)]
        if front := latency.get(FRONT):
            parts.append(f"{front}\n{caption(found)}")
        if any(rest):
            parts.append(_aside(f"More on {machine(dict(found))}", "\n".join(filter(None, rest)), caption(found)))
    return "\n".join(filter(None, parts))


def exports_markdown(table: str, reports: Path) -> str:
    """One table's exported files: format, bytes and digest of each."""
    manifests = [read_json(path) for path in sorted((reports / table).glob("runs/*/export.json"))]
    if not manifests:
        return "No row is exported.\n"
    headers = ["Row", "File", "Bytes", "Ratio to dense", "SHA-256"]
    lines = []
    for manifest in manifests:
        for file in manifest["files"]:
            ratio = ratio_to_dense(file, manifest["files"])
            lines.append([manifest["row"], file["file"], f"{file['bytes']:,}", ratio, code(file["sha256"])])
    facts = [f"{m['row']}: seed {m['seed']}, {m['layers']} layers {m['pattern'] or 'dense'}" for m in manifests]
    return f"{markdown(headers, lines)}\n*{escaped('; '.join(facts))}. In `artifacts/exports/<row>/`.*\n"


def ratio_to_dense(file: Row, files: Iterable[Row]) -> str:
    """How large a file is, as a multiple of the dense one of its type."""
    dense = _file(files, DENSE, file["dtype"])
    return MISSING if dense is None else f"{file['bytes'] / dense['bytes']:.3f}"


def _aside(summary: str, *texts: str) -> str:
    """Folded away on a page; there has to be an empty line between tags and tables."""
    inside = "\n".join(texts)
    return f"<details><summary>{escaped(summary)}</summary>\n\n{inside}\n</details>\n"


def exported(reports: Path) -> list[tuple[str, list[Row]]]:
    """The files of each exported row, by what it is called."""
    found = []
    for path in sorted(reports.glob("*/runs/*/export.json")):
        manifest = read_json(path)
        found.append((f"{path.parts[-4]}, {manifest['row']}", list(manifest["files"])))
    return found


def benchmarked(measured: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The files of each model of the benchmark; those of one run are enough, as sizes depend on no machine."""
    found: dict[str, list[Row]] = {}
    for run in measured:
        rows = rows_of(run, "size")
        for model in distinct(rows, "model"):
            found.setdefault(_model(model), [row for row in rows if row["model"] == model])
    return list(found.items())


def size_table(lines: Sequence[tuple[str, list[Row]]]) -> str:
    """A line a row or model, a column a kind of file: bytes, and the ratio to the dense file of the same type."""
    kinds = [
        (form, dtype) for form in FORMATS for dtype in DTYPES if any(_file(files, form, dtype) for _, files in lines)
    ]
    if not kinds:
        return ""
    cells = [[label, *(_size(files, *kind) for kind in kinds)] for label, files in lines]
    return markdown(["On disk", *(" ".join(filter(None, kind)) for kind in kinds)], cells)


def latency_tables(found: Row) -> dict[str, str]:
    """A table a way to run whole models, by mode; a line a model and batch, a column a candidate."""
    rows = rows_of(found, "latency")
    lines = list(dict.fromkeys(tuple(row[column] for column in LINE) for row in rows))
    return {
        mode: table(title, [row for row in rows if row["mode"] == mode], _speed, lines) for mode, title in MODES.items()
    }


def part_tables(found: Row) -> list[str]:
    """The same of the parts of one block."""
    rows = rows_of(found, "parts")
    return [table(title, [row for row in rows if row["part"] == part], _speed) for part, title in PARTS.items()]


def memory_table(found: Row) -> str:
    """MiB of weights, and of the most beyond them: a line a model, at its largest batch."""
    rows = [row for row in rows_of(found, "latency") if "weights_mb" in row]
    largest = {model: max(row["batch"] for row in rows if row["model"] == model) for model in distinct(rows, "model")}
    return table(MEMORY, [row for row in rows if row["batch"] == largest[row["model"]]], _memory)


def table(
    title: str, rows: Sequence[Row], cell: Callable[[Row], str], lines: Sequence[tuple[Any, ...]] | None = None
) -> str:
    """A line a model and batch, by default those of the rows; a column a candidate; empty without rows."""
    if not rows:
        return ""
    names = [name for name in CANDIDATES if find(rows, {"candidate": name})]
    shown = []
    for key in lines or dict.fromkeys(tuple(row[column] for column in LINE) for row in rows):
        where = dict(zip(LINE, key, strict=True))
        cells = [find(rows, {**where, "candidate": name}) for name in names]
        label = f"{_model(where['model'])}, {where['precision']}, batch {where['batch']}"
        shown.append([label, *(MISSING if row is None else cell(row) for row in cells)])
    return markdown([title, *(CANDIDATES[name] for name in names)], shown)


def _speed(row: Row) -> str:
    text = f"{significant(row['ms'], 3)} ms"
    return text if row["candidate"] == DENSE else f"{text} ({row['speedup']:.2f}×)"


def _memory(row: Row) -> str:
    return f"{significant(row['weights_mb'], 3)} + {significant(row['peak_mb'], 3)}"


def _size(files: Iterable[Row], form: str, dtype: str | None) -> str:
    files = list(files)
    row, dense = _file(files, form, dtype), _file(files, DENSE, dtype)
    if row is None:
        return MISSING
    unit, size = ("MiB", 2**20) if row["bytes"] >= 2**20 else ("KiB", 2**10)
    text = f"{significant(row['bytes'] / size, 3)} {unit}"
    return text if dense is None or form == DENSE else f"{text} ({row['bytes'] / dense['bytes']:.2f}×)"


def _file(files: Iterable[Row], form: str, dtype: str | None) -> Row | None:
    return find(files, {"format": form, "dtype": dtype})


def _model(name: str) -> str:
    return MODELS.get(name, name)
