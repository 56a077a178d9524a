"""Stages that end with the DVC that started them, however that ends; those that a person starts go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from maskllm4v.utils.processes import began

STAGE = "DVC_STAGE"  # DVC tells each of its commands which stage that is
INTERVAL = 0.5  # seconds between two looks


def started_by_dvc() -> bool:
    """Whether this process is a stage that DVC has started."""
    return bool(os.environ.get(STAGE))


def end_with_dvc() -> None:
    """Have this process get SIGTERM once DVC has ended; nothing if it was not started by DVC.

    DVC starts commands through a shell, which lives on when DVC is killed, and there may be a launcher in between. So
    all ancestors up to DVC are watched: it is the first one that was not told this stage. Where there is no ``/proc``,
    only the parent is.
    """
    if stage := os.environ.get(STAGE):
        Thread(target=_end, args=(_one_has_ended(stage),), daemon=True).start()


def _one_has_ended(stage: str) -> Callable[[], bool]:
    parent = os.getppid()
    if not Path("/proc/self/environ").exists():
        return lambda: os.getppid() != parent
    watched = {pid: began(pid) for pid in _up_to_dvc(parent, stage)}
    return lambda: os.getppid() != parent or any(began(pid) != start for pid, start in watched.items())


def _up_to_dvc(pid: int, stage: str) -> list[int]:
    """A process and its ancestors, up to the first one whose environment does not have this stage."""
    told, found = f"{STAGE}={stage}".encode(), list[int]()
    while pid > 0:
        found.append(pid)
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if told not in environment:
                break
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended, or is another user's
            break
    return found


def _end(ended: Callable[[], bool]) -> None:
    while not ended():
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves its state, and ends
