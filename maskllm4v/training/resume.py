"""Interrupted trainings: their state on disk, and stopping when asked to.

A state holds what was trained (logits or weights), averages, optimiser and step, never frozen weights. It
lies in ``.cache/resume/<row>/``, named by a digest of everything that the result depends on, and is
removed when its stage has ended well. Files are read with ``weights_only=True``: no code in them is run.
"""

from __future__ import annotations

import pickle
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import resume_folder
from maskllm4v.runs.records import FORMAT, versions
from maskllm4v.utils.errors import CheckpointError
from maskllm4v.utils.io import replacing, value_digest
from maskllm4v.utils.processes import is_main

IMPATIENCE = 2.0  # seconds after which a second Ctrl-C means: at once
_DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
KEPT = 2  # states of one row and seed, e.g. of the settings before the last change


class Resume:
    """Where a training's state is kept between interruptions.

    Args:
        folder: of the row.
        seed: of the training.
        identity: everything that the result depends on, as plain values.
        minutes, steps: between two states; 0: never.
    """

    def __init__(
        self, folder: Path, seed: int, identity: Mapping[str, Any], *, minutes: float = 5.0, steps: int = 0
    ) -> None:
        self.digest = value_digest(identity)
        self.folder, self.seed = folder, seed
        self.path = folder / f"seed{seed}-{self.digest[:16]}.pt"
        self._seconds, self._steps = 60 * minutes, steps
        self._last = time.monotonic()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The state last saved, or None.

        Raises:
            CheckpointError: the file is damaged, or belongs to other settings.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                if damaged := archive.testzip():  # torch.load does not look at checksums
                    raise ValueError(f"{damaged} does not have the checksum it was written with")
            found = torch.load(self.path, map_location=device, weights_only=True)
            digest, state = found["digest"], found["state"]
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.path} is damaged ({said}); delete it to start from the beginning") from error
        if digest != self.digest:
            raise CheckpointError(f"{self.path} belongs to a training of other settings; delete it or move it away")
        return dict(state)

    def due(self, step: int) -> bool:
        """Whether a state should be saved after this step."""
        if self._steps and (step + 1) % self._steps == 0:
            return True
        return bool(self._seconds) and time.monotonic() - self._last >= self._seconds

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state in the place of the one before, whole or not at all."""
        with replacing(self.path) as temporary:
            torch.save({"digest": self.digest, "state": dict(state)}, temporary)
        self._last = time.monotonic()
        # A kill may have left a half-written file; settings that changed leave states nobody may want again.
        for leftover in self.folder.glob(f".seed{self.seed}-*.part"):
            leftover.unlink(missing_ok=True)
        states = sorted(self.folder.glob(f"seed{self.seed}-*.pt"), key=lambda path: path.stat().st_mtime)
        for old in states[:-KEPT]:
            old.unlink(missing_ok=True)


def resume_of(experiment: Experiment, row: str, seed: int, **inputs: str) -> Resume:
    """Where the state of one row and seed is kept.

    Args:
        experiment: settings, and how often to save.
        row: its key.
        seed: of the training.
        inputs: digests of what the training starts from.
    """
    runtime = experiment.runtime
    return Resume(
        resume_folder(row),
        seed,
        {
            "settings": experiment.row(row).made_with(defaults=False),
            "format": FORMAT,  # of settings without defaults, and so which defaults these are
            "seed": seed,
            "inputs": inputs,
            "versions": versions(experiment.task.name),
        },
        minutes=runtime.checkpoint_minutes,
        steps=runtime.checkpoint_steps,
    )


def forget(row: str) -> None:
    """Remove all states of a row: it is finished."""
    if is_main():
        shutil.rmtree(resume_folder(row), ignore_errors=True)


class Stop:
    """Whether somebody asked this process to end."""

    signal: int | None = None
    asked = 0.0  # when, on the monotonic clock

    def __bool__(self) -> bool:
        return self.signal is not None

    def leave(self) -> None:
        """End as the signal would have ended the process."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal or 0))


@contextmanager
def stopping() -> Iterator[Stop]:
    """Inside, SIGTERM and SIGINT only set a flag, so that a step can be finished and saved first."""
    stop = Stop()

    def note(number: int, _: FrameType | None) -> None:
        # Launchers pass on what the terminal or the scheduler has sent to everybody: the same wish, told twice.
        again = stop.signal is not None and time.monotonic() - stop.asked > IMPATIENCE
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signal is None:
            stop.signal, stop.asked = number, time.monotonic()

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: whoever runs this has to end it
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
