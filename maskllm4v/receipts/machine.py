"""The CPU and the system that results were made on: what tells machines apart, and nothing that tells people apart."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path

from maskllm4v.receipts.model import CPU

CPUINFO = Path("/proc/cpuinfo")
X86_64 = ("x86_64", "AMD64")


def read_cpu() -> CPU:
    """The CPU of this machine; what it does not say is None. An emulated process sees its host's."""
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        text = ""
    return describe_cpu(text, platform.machine(), platform.processor())


def describe_cpu(cpuinfo: str, architecture: str, processor: str = "") -> CPU:
    """A CPU from the text of Linux's ``/proc/cpuinfo``, whose first block is read.

    Args:
        cpuinfo: the file's text; empty on other systems.
        architecture, processor: as :func:`platform.machine` and :func:`platform.processor` say.
    """
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    name = _text(found.get("model name", "")) or _text(processor) or _text(architecture) or "unknown CPU"
    flags = found.get("flags")
    return CPU(
        name=name,
        architecture=re.sub(r"[^A-Za-z0-9_]", "", architecture) or "unknown",
        vendor=_text(found.get("vendor_id", "")) or None,
        family=_number(found, "cpu family"),
        model=_number(found, "model"),
        stepping=_number(found, "stepping"),
        avx2=None if flags is None else "avx2" in flags.split(),
    )


def read_system() -> str:
    """The system with its release, without what its owner may have called it: ``Linux 6.1, debian 12``."""
    release = re.match(r"\d+(\.\d+)?", platform.release())
    found = [f"{platform.system()} {release[0] if release else ''}"]
    try:
        about = platform.freedesktop_os_release()
    except OSError:  # no Linux, or one without that file
        about = {}
    if "ID" in about:
        found.append(f"{about['ID']} {about.get('VERSION_ID', '')}")
    return _text(", ".join(part.strip() for part in found)) or "unknown system"


def _number(found: Mapping[str, str], key: str) -> int | None:
    return int(found[key]) if re.fullmatch(r"\d{1,9}", found.get(key, "")) else None


def _text(words: str) -> str:
    """Without what a receipt does not allow."""
    return " ".join(re.sub(r"[^A-Za-z0-9 ()@.,:+=-]", " ", words).split())[:80].strip()
