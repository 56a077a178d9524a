"""Say whether a table came out here as it was committed, and write that down in receipt-<table>.json.

Without options: the active table's rows are compared with the commit. The exit status is 0 even if rows differ: this is
the end of `make repro`, which has made the results that were asked for. With --check it is 1 unless all rows are equal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskllm4v.runs.paths import REPORTS
from maskllm4v.utils.errors import ConfigError, UserError

if TYPE_CHECKING:
    from maskllm4v.receipts import Receipt

COLOURS = {"✔": 32, "✘": 31, "≈": 33, "–": 33}  # of lines that begin with these; as terminals number them
WIDTH = 80  # where nobody says how wide it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--compare", nargs="+", type=Path, metavar="FILE", help="compare a receipt with this machine's, or two receipts"
    )
    what.add_argument(
        "--add",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help=f"put a receipt (default: the active table's) into {REPORTS}/receipts/, for README and captions",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all rows are equal")
    parser.add_argument(
        "--since", type=float, metavar="SECONDS", help="when the run began (date +%%s), to say how long it took"
    )


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    if a.compare is not None:
        return _compare(a.compare, a.check)
    if a.add is not None:
        return _add(a.add)
    from maskllm4v.config import load_experiment
    from maskllm4v.receipts import build_receipt, receipt_file, write_receipt
    from maskllm4v.receipts.text import verdict

    receipt = build_receipt(Path(), load_experiment(), begin=a.since)
    write_receipt(receipt_file(Path(), receipt.table), receipt)
    _print(verdict(receipt, _width()))
    return 1 if a.check and not receipt.agrees else 0


def _compare(files: Sequence[Path], check: bool) -> int:
    from maskllm4v.receipts.comparison import comparison, differing_rows
    from maskllm4v.receipts.store import read_receipt

    if len(files) > 2:
        raise UserError(f"--compare takes one file or two, not {len(files)}")
    given = [(str(path), read_receipt(path)) for path in files]
    if len(given) == 1:
        given.insert(0, _own(given[0][1].table))
    (one, first), (other, second) = given
    _print(comparison((one, other), (first, second), _width()))
    return 1 if check and differing_rows(first.rows, second.rows) else 0


def _own(table: str) -> tuple[str, Receipt]:
    """This machine's receipt of a table: the file, or of the active table what lies here."""
    from maskllm4v.config import load_experiment
    from maskllm4v.receipts import build_receipt, receipt_file
    from maskllm4v.receipts.store import read_receipt

    path = receipt_file(Path(), table)
    if path.exists():
        return str(path), read_receipt(path)
    experiment = load_experiment()
    if experiment.table != table:
        raise ConfigError(f"no {path} here to compare with; make it with `make use EXPERIMENT={table} && make repro`")
    return "here", build_receipt(Path(), experiment)


def _add(path: Path) -> int:
    from maskllm4v.config import load_experiment
    from maskllm4v.receipts.build import published_experiments, receipt_file
    from maskllm4v.receipts.store import add_receipt, read_receipt

    if path == Path():
        path = receipt_file(Path(), load_experiment().table)
    receipt = read_receipt(path)
    added = add_receipt(receipt, path, published_experiments(Path()), REPORTS)
    equal = len(receipt.named("equal"))
    _print([f"{added}: {equal} of {len(receipt.rows)} rows on {receipt.machine}", "next: python -m maskllm4v report"])
    return 0


def _width() -> int:
    return shutil.get_terminal_size((WIDTH, 0)).columns


def _print(lines: Sequence[str]) -> None:
    """Lines, the verdict in bold and in colour where the terminal has that."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in lines:
        colour = COLOURS.get(line[:1])
        print(f"\033[1;{colour}m{line}\033[0m" if coloured and colour else line)
