"""States of trainings that nobody will go on with."""

from __future__ import annotations

import shutil
from contextlib import suppress

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import RESUME, resume_folder, resume_lock
from maskllm4v.runs.provenance import read_origin
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.locks import held


def sweep_states(experiment: Experiment) -> None:
    """Remove the states of rows that are finished nevertheless.

    A training that ends removes its row's states; DVC, which restores a finished row from its run cache after one was
    interrupted, does not.
    """
    for row in sorted(path.name for path in RESUME.glob("*/")):
        # One that is not of this table, was made with other settings or is being trained is left alone.
        with suppress(UserError), held(resume_lock(row), f"row {row!r} is trained"):
            read_origin(experiment, row)
            shutil.rmtree(resume_folder(row), ignore_errors=True)
