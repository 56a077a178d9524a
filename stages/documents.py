"""Render what shows all tables from the committed records: README, findings, and the list of tables."""

from __future__ import annotations

from pathlib import Path

from maskllm4v.config import Experiment
from stages.entry import run


def main(_active: Experiment, _: str) -> None:
    from maskllm4v.reporting.report import write_documents

    for path in write_documents(Path()):
        print(path)


if __name__ == "__main__":
    run("documents", main, takes=None, torch=False)
