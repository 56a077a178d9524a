"""Which of several processes this is, by the environment variables that ``torchrun`` and its like set."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def world_size() -> int:
    """How many processes compute together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, however it dies: no orphan goes on training."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def share_cores(processes: int) -> None:
    """Divide the machine's cores among its processes, unless somebody has; call before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
