"""What is left to do when a stage has ended well: its time, and states that nobody will go on with."""

from __future__ import annotations

import shutil
from contextlib import suppress

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import RESUME, TIMINGS, resume_folder, resume_lock
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import write_aside
from maskllm4v.utils.locks import held
from maskllm4v.utils.orphans import started_by_dvc


def tidy_up(experiment: Experiment, stage: str, key: str, *, seconds: float) -> None:
    """After a stage, which took so long: neither fails it."""
    sweep_states(experiment)
    write_aside(TIMINGS / f"{stage}@{key or experiment.table}.json", {"seconds": round(seconds, 3)})


def sweep_states(experiment: Experiment) -> None:
    """Remove the states of rows that are finished nevertheless; for stages that DVC has started.

    A training that ends removes its row's states; DVC, which restores a finished row from its run cache after one was
    interrupted, does not.
    """
    rows = sorted(path.name for path in RESUME.glob("*/")) if started_by_dvc() else []
    for row in rows:
        from maskllm4v.runs.provenance import read_origin  # imports torch, which some stages do without

        # One that is not of this table, was made with other settings or is being trained is left alone.
        with suppress(UserError), held(resume_lock(row), f"row {row!r} is trained"):
            read_origin(experiment, row)
            shutil.rmtree(resume_folder(row), ignore_errors=True)
