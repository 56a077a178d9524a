"""Say for each layer of a file whether it is N:M sparse, along which axis, and which group is the first at fault.

FILE is one of ours, any safetensors, .pt or .pth.tar file, or an ONNX graph. What has to hold: the layers that a file
of ours names, all masks, and --layers; where nothing says which layers were pruned, every weight of two dimensions of
which more than a few values are zero.

With --model, the masks of a file are put into that model, too, whose outputs have to be the same as with the masks
folded into its weights.

Exit status: 0 if all that have to hold do; 1 if one does not, nothing is N:M sparse at all, or outputs differ; 2 if the
file cannot be read, or the command is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskllm4v.cli import options

if TYPE_CHECKING:
    from maskllm4v.export.verify import LayerCheck

COLUMNS = ("layer", "shape", "pattern", "verdict", "axis", "density", "first violation")
VIOLATED, UNREADABLE = 1, 2  # exit statuses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="FILE", help="weights, masks, or a graph")
    options.add_pattern(parser, "what the file says; if it says nothing 2:4")
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="GLOB", help="that have to hold even if they look dense: 'blocks.*'"
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="layers that are left out")
    parser.add_argument("--json", action="store_true", help="print a list of objects, one a layer, and nothing else")
    options.add_model(parser, required=False, images=False)
    parser.set_defaults(error_status=UNREADABLE, workers=0, device="cpu")


def run(arguments: argparse.Namespace) -> int:
    from maskllm4v.export.verify import passes, verify_file
    from maskllm4v.sparsity.patterns import NMPattern

    a = arguments
    pattern = None if a.pattern is None else NMPattern(a.pattern)
    checks = verify_file(a.file, pattern, layers=a.layers, exclude=a.exclude)
    passed = passes(checks)
    differs = "" if a.model is None else _compared(a)
    if a.json:
        import json

        print(json.dumps([as_json(check) for check in checks], indent=4))
    else:
        print(*table(checks), summary(a.file, checks, passed), sep="\n")
    if differs:
        print(f"{a.file}: {differs}", file=sys.stderr)
    return 0 if passed and not differs else VIOLATED


def _compared(a: argparse.Namespace) -> str:
    """How the outputs of a model under a file's masks differ from those with the masks folded in; empty: not at all.

    Raises:
        CheckpointError: the file holds no masks, or does not fit the model.
    """
    from maskllm4v.checkpoints.third_party import load_any
    from maskllm4v.cli import inputs
    from maskllm4v.export.folding import check_folded
    from maskllm4v.tasks.base import open_task
    from maskllm4v.utils.errors import CheckpointError, PatternError

    if a.file.suffix == ".onnx":
        raise CheckpointError(f"{a.file}: --model is for masks; export has compared a graph's outputs with the model's")
    found = load_any(a.file, pattern=a.pattern)
    if not found.masks:
        raise CheckpointError(f"{a.file} holds no masks to put into --model {a.model}")
    spec = options.settings(options.Flags, a, model={"exclude": a.exclude or ["head"]}).spec
    task = open_task(spec)
    model, _ = inputs.masked_model(a, spec, task, found, a.file)
    example = task.exportable(model, 2)
    try:
        batch = tuple(example.inputs.values())
        check_folded(example.module, batch, forward=lambda module, batch: example.named(module(*batch)))
    except PatternError as error:
        return str(error)
    inputs.say(f"{a.model}: the same outputs under the masks as with the masks folded in")
    return ""


def as_json(check: LayerCheck) -> dict[str, Any]:
    """A layer's check as plain values."""
    return {**vars(check), "shape": list(check.shape), "pattern": str(check.pattern)}


def table(checks: list[LayerCheck]) -> list[str]:
    """Aligned lines, the columns' names first; none without layers."""
    cells = [COLUMNS, *map(_cells, checks)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return [line.rstrip() for line in lines] if checks else []


def _cells(check: LayerCheck) -> tuple[str, ...]:
    shape = "×".join(map(str, check.shape))
    density = f"{check.density:.4f}"
    return check.layer, shape, str(check.pattern), check.verdict, check.axis or "–", density, check.violation or "–"


def summary(path: Path, checks: list[LayerCheck], passed: bool) -> str:
    """One line: what the exit status says, and how many layers of which kind there are."""
    if not checks:
        return f"{path}: no weights to check"
    hold, violated, dense = (sum(c.verdict == verdict for c in checks) for verdict in ("holds", "violated", "dense"))
    pattern = checks[0].pattern
    said = f"{pattern} holds" if passed else f"{pattern} is violated" if violated else f"nothing is {pattern} sparse"
    return f"{path}: {said} (layers: {hold} hold, {violated} violated, {dense} dense)"
