"""Workers: processes that run stages, each on one CPU, told through pipes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from maskllm4v.utils.errors import UserError
from scripts.emulation.pipeline import Call

NATIVE = "native"
EMULATORS = ("qemu-x86_64", "qemu-x86_64-static")  # of Debian's qemu-user and qemu-user-static
WORKER = "scripts.emulation.worker"
# Of launchers, servers and DVC: they are for runs of the user's own.
UNSET = (
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "RANK",
    "WORLD_SIZE",
    "MASKLLM4V_LAUNCHER",
    "MLFLOW_TRACKING_URI",
    "DVC_ROOT",
)
# pyarrow comes with pandas; the thread of its allocator would be missing in forked processes.
SET = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "CUDA_VISIBLE_DEVICES": ""}


class WorkerError(UserError):
    """A process that runs stages has ended, or does not speak."""


def emulator() -> str | None:
    """QEMU's program for x86-64, if it is installed."""
    return next((path for name in EMULATORS if (path := shutil.which(name))), None)


def emulator_version() -> str:
    """``"QEMU 7.2"``; empty if it is not installed."""
    if (path := emulator()) is None:
        return ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return f"QEMU {found[1]}" if (found := re.search(r"version (\d+\.\d+)", said)) else "QEMU"


@dataclass(frozen=True)
class Answer:
    """How a call went.

    Attributes:
        status: exit status of its process; negative: the signal that ended it.
        seconds: of CPU, user and system.
        modules: what it imported that was not there yet.
    """

    status: int
    seconds: float
    modules: list[str]


class Worker:
    """One process, which computes on one CPU.

    Attributes:
        cpu: ``"native"``, or one that QEMU knows, such as ``"Haswell"``.
        kernels: which instructions torch's and NumPy's kernels are of there.
        seconds: of CPU that it has taken in all, once it has ended.

    Raises:
        WorkerError: QEMU is not installed or knows no such CPU, or the process could not start.
    """

    def __init__(self, cpu: str, root: Path, errors: Path) -> None:
        """Start it.

        Args:
            cpu: see above.
            root: of the repository whose stages it runs.
            errors: file for what it prints.
        """
        self.cpu, self.seconds, self._errors = cpu, 0.0, errors
        command = [sys.executable, "-m", WORKER]
        if cpu != NATIVE:
            if (qemu := emulator()) is None:
                raise WorkerError(f"emulating a {cpu} needs one of {', '.join(EMULATORS)} (Debian's package qemu-user)")
            command = [qemu, "-cpu", cpu, *command]
        environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        with errors.open("w") as stream:
            self._process = subprocess.Popen(
                command,
                cwd=root,
                env={**environment, **SET},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        self.kernels: dict[str, str] = {}
        self._ending = threading.Lock()  # one thread may read while another, after an error, ends all

    def wait(self) -> None:
        """Until it has imported torch."""
        self.kernels = self._read()

    def run(self, folder: Path, call: Call, modules: Sequence[str] = ()) -> Answer:
        """Run a call in a project's folder; see :func:`scripts.emulation.worker.answer`.

        Raises:
            WorkerError: the process has ended. What the call does, a crash included, is in the answer.
        """
        assert self._process.stdin is not None
        asked = {"folder": str(folder), "stage": call.stage, "key": call.key, "modules": list(modules)}
        with suppress(OSError):  # it has ended; reading says so
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        return Answer(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        status = self._end()
        said = "\n".join(last_lines(self._errors))
        raise WorkerError(f"the process of CPU {self.cpu!r} ended with status {status}:\n{said}")

    def _end(self) -> int:
        """Let it end, and note what it took."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        with self._ending:
            if self._process.returncode is None:
                _, status, usage = os.wait4(self._process.pid, 0)
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.seconds = usage.ru_utime + usage.ru_stime
            return self._process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._process.returncode is None:
            self._process.terminate()
        self._end()


def last_lines(log: Path, count: int = 12) -> list[str]:
    """The end of what a process printed, without QEMU's warnings of instructions that it lacks."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line for line in lines if "TCG doesn't support requested feature" not in line][-count:]
