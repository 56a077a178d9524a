"""Trainings that can be watched: their curves grow in files, and another process sends those to MLflow.

A training neither imports MLflow nor waits for it: whatever happens over there, it goes on.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import live_folder
from maskllm4v.runs.workspace import has_store
from maskllm4v.utils.processes import is_main

SENDER = "maskllm4v.tracking.sender"
PATIENCE = 5.0  # seconds that the sender has for the last points


@contextmanager
def watched(experiment: Experiment, row: str) -> Iterator[None]:
    """Inside, curves that grow in ``.cache/live/<row>/`` are sent to MLflow, where it has a store to send them to."""
    if not is_main():
        yield
        return
    shutil.rmtree(live_folder(row), ignore_errors=True)  # of a training cut short, maybe with other settings
    sender = _started(experiment, row)
    ended = b""
    try:
        yield
        ended = b"done\n"
    finally:
        if sender is not None:
            _end(sender, ended)
    shutil.rmtree(live_folder(row), ignore_errors=True)


def _started(experiment: Experiment, row: str) -> subprocess.Popen[bytes] | None:
    """The sender, told what the row is; its standard input ends when the training does, however that comes."""
    if not (experiment.runtime.live and has_store(Path()) and find_spec("mlflow") is not None):
        return None
    try:
        # In a session of its own: Ctrl-C is for the training, whose last points are still to be sent.
        sender = subprocess.Popen(
            [sys.executable, "-m", SENDER, row],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None
    _tell(sender, experiment.model_dump_json().encode() + b"\n")
    return sender


def _tell(sender: subprocess.Popen[bytes], text: bytes) -> None:
    assert sender.stdin is not None
    with suppress(OSError):  # it has ended
        sender.stdin.write(text)
        sender.stdin.flush()


def _end(sender: subprocess.Popen[bytes], text: bytes) -> None:
    assert sender.stdin is not None
    _tell(sender, text)
    with suppress(OSError):
        sender.stdin.close()
    for insist in (sender.poll, sender.terminate, sender.kill):
        insist()
        with suppress(subprocess.TimeoutExpired):
            sender.wait(PATIENCE)
            return
