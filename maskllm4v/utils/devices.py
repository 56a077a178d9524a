"""Where to compute, and what it is called."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from maskllm4v.utils.errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    """``"auto"``: CUDA where there is one, else the CPU; otherwise the device named.

    CPUs flush denormal numbers to zero from then on: Adam's moments of decided masks are full of them, and CPUs are
    many times slower on them. Threads inherit that from the one that starts them, so it comes early.

    Raises:
        ConfigError: the name is unknown, or there is no such device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes: a GPU each
        wanted = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device is {wanted!r}; allowed: auto, cpu, cuda, cuda:0, mps, ...") from error
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type in available and (device.index or 0) >= available[device.type]:
        found = f"{available[device.type] or 'no'} {device.type.upper()} device"
        raise ConfigError(f"runtime.device is {wanted!r}, but torch finds {found} here")
    return device


def hardware(device: torch.device) -> str:
    """A device in words, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
