"""Render tables, figures and the README from the committed records, check them, or print a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskllm4v.runs.paths import REPORTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--check", action="store_true", help="only say whether README and records agree")
    alone.add_argument(
        "--allow-empty", action="store_true", help="write a table without any number where one with numbers stands, too"
    )
    alone.add_argument("--show", nargs="?", const="", metavar="TABLE", help="only print the active table, or this one")


def run(a: argparse.Namespace) -> None:
    from maskllm4v.reporting.report import check_report, find_experiment, write_report
    from maskllm4v.reporting.terminal import show

    if a.check:
        check_report(Path())
        print("README and tables agree with the records")
        return
    written = [] if a.show is not None else write_report(Path(), allow_empty=a.allow_empty)
    show(find_experiment(Path(), a.show), REPORTS)
    for path in written:
        print(path)
