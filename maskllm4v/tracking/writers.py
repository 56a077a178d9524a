"""Who writes an unfinished run, as its tag ``writer`` says: those of the living are left alone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from maskllm4v.runs.workspace import main_root
from maskllm4v.utils.io import value_digest
from maskllm4v.utils.processes import began

TAG = "writer"
OLD = 24 * 3600.0  # seconds without a sign of life after which a writer on another host counts as dead


def signed(root: Path) -> str:
    """Host, process and its start, repository, and now: a sign of life of this process."""
    return " ".join(
        [socket.gethostname(), str(os.getpid()), began(os.getpid()), _repository(root), f"{time.time():.0f}"]
    )


def is_dead(tags: Mapping[str, str]) -> bool:
    """Whether nobody else writes a run: its process ended, is this one, or gave no sign for a day."""
    host, pid, start, _, seen = _parts(tags)
    if host == socket.gethostname():
        return not pid.isdigit() or int(pid) == os.getpid() or began(int(pid)) != start
    return not seen.isdigit() or time.time() - int(seen) > OLD


def is_from(tags: Mapping[str, str], root: Path) -> bool:
    """Whether a run was written from this host's repository at ``root``, or a copy that DVC made of it."""
    host, _, _, repository, _ = _parts(tags)
    return (host, repository) == (socket.gethostname(), _repository(root))


def _parts(tags: Mapping[str, str]) -> list[str]:
    parts = tags.get(TAG, "").split(" ")
    return parts if len(parts) == 5 else [""] * 5


def _repository(root: Path) -> str:
    return value_digest([str(main_root(root))])[:12]  # no path of anybody's machine on a server
