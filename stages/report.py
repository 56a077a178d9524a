"""Render the active table's committed records: ``reports/<table>/``."""

from __future__ import annotations

from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import REPORTS
from stages.entry import run


def main(experiment: Experiment, _: str) -> None:
    from maskllm4v.reporting.report import write_table
    from maskllm4v.reporting.terminal import show

    written = write_table(Path())
    show(experiment, REPORTS)
    for path in written:
        print(path)


if __name__ == "__main__":
    run("report", main, takes=None, torch=False)
