"""Publish the committed records to MLflow; a stamp in the store says what it holds."""

from __future__ import annotations

from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.utils.io import write_json
from stages.entry import run


def main(experiment: Experiment, _: str) -> None:
    from maskllm4v.tracking.publishing import publish
    from maskllm4v.tracking.store import STAMPS

    published = publish(Path(), experiment)
    # Lies in the store and says what it holds: DVC runs this stage again when the store was deleted.
    write_json(STAMPS / f"{experiment.table}.json", published)
    print(f"{len(published)} runs stand for table {experiment.table!r}")


if __name__ == "__main__":
    run("track", main, takes=None, torch=False)
