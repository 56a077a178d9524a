"""Which of several processes this is, by the environment variables that ``torchrun`` and its like set."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes compute together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0
