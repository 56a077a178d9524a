"""Which of several processes this is, by the variables that ``torchrun`` and its like set, and when others began."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path


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


def began(pid: int) -> str:
    """When a process began, in the kernel's ticks: numbers of processes are used again. Empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # a zombie has ended, though nobody has asked how
    except OSError:
        if Path("/proc/self").exists():
            return ""
    try:  # no Linux
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "there"


def share_cores(processes: int) -> None:
    """Divide the machine's cores among its processes, unless somebody has; call before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
