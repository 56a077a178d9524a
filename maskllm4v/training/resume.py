"""Interrupted trainings: their state on disk, and stopping when asked to.

A state holds what was trained (logits or weights), averages, optimiser and step, never frozen weights. It
lies in ``.cache/resume/<row>/``, named by a digest of everything that the result depends on, and is
removed when its stage has ended well. Files are read with ``weights_only=True``: no code in them is run.

The number at the end of a state's name says which of a seed's states was saved last: clocks can be set back.
"""

from __future__ import annotations

import pickle
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import resume_folder, resume_lock
from maskllm4v.runs.records import FORMAT, versions
from maskllm4v.utils.errors import CheckpointError, UserError
from maskllm4v.utils.io import replacing, value_digest
from maskllm4v.utils.locks import held
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
        self._seconds, self._steps = 60 * minutes, steps
        self._last = time.monotonic()
        self._failed = False

    @property
    def path(self) -> Path:
        """The state last saved; what its name would be, if none was."""
        mine = [path for path in self._states() if path.stem.partition("_")[0] == self._name]
        return mine[-1] if mine else self.folder / f"{self._name}_1.pt"

    @property
    def _name(self) -> str:
        return f"seed{self.seed}-{self.digest[:16]}"

    def _states(self) -> list[Path]:
        """All states of this seed, of these settings and others, in the order in which they were saved."""
        return sorted(self.folder.glob(f"seed{self.seed}-*.pt"), key=_number)

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
        """Write a state, whole or not at all, and then remove the one before.

        Where it cannot be written (a full disk), a line says so, once, and the one before stays.
        """
        self._last = time.monotonic()
        before = self._states()
        path = self.folder / f"{self._name}_{1 + max(map(_number, before), default=0)}.pt"
        try:
            with replacing(path) as temporary:
                torch.save({"digest": self.digest, "state": dict(state)}, temporary)
        except (UserError, OSError, RuntimeError) as error:  # torch's writer raises the last
            self._say_failed(path, error)
            return
        self._failed = False
        # A kill may have left a half-written file; settings that changed leave states nobody may want again.
        mine = [old for old in before if old.stem.partition("_")[0] == self._name]
        others = [old for old in before if old not in mine]
        for old in (*mine, *others[: 1 - KEPT], *self.folder.glob(f".seed{self.seed}-*.part")):
            with suppress(OSError):
                old.unlink()

    def _say_failed(self, path: Path, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(self.folder).free / 2**20:.0f} MiB are free there"
        said = f"{str(error).splitlines()[0][:200]}{free}"
        print(f"{path} cannot be saved, so the state before stays ({said})", file=sys.stderr, flush=True)


def _number(state: Path) -> int:
    """Of a state's name; 0 where it has none."""
    digits = state.stem.partition("_")[2]
    return int(digits) if digits.isdecimal() else 0


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


@contextmanager
def only_training(row: str) -> Iterator[None]:
    """Inside, this is the only training of a row; if it ends well, all states of the row are removed.

    Raises:
        UserError: another process trains it; names the row and that process.
    """
    if not is_main():
        yield
        return
    with held(resume_lock(row), f"row {row!r} is trained"):
        yield
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
