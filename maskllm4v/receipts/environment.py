"""Whether results were made in the locked environment, and which settings of kernels a user had exported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from maskllm4v.runs.records import PACKAGES, TASK_PACKAGES
from maskllm4v.utils.determinism import ENVIRONMENT

LOCK = "requirements.lock"
UNPINNED = (  # choose kernels or their precision, too, and the pin leaves them as they are
    "DNNL_DEFAULT_FPMATH_MODE",
    "GLIBC_TUNABLES",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
)


def unlocked(root: Path) -> dict[str, tuple[str | None, str]] | None:
    """Packages whose release is not the one in ``requirements.lock``, as (here, locked).

    Returns:
        By name, sorted; a package that is not installed has None. None as a whole where there is no such file.
    """
    try:
        lines = (root / LOCK).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    found = {}
    for line in lines:
        if not re.match(r"[A-Za-z0-9]", line):  # hashes and comments
            continue
        try:
            pinned = Requirement(line.rstrip("\\ "))
        except InvalidRequirement:
            continue
        if pinned.marker is None or pinned.marker.evaluate():
            here, locked = _installed(pinned.name), str(pinned.specifier).removeprefix("==")
            if here != locked:
                found[pinned.name] = (here, locked)
    return dict(sorted(found.items()))


def package_versions(task: str) -> dict[str, str | None]:
    """Releases that a task's results may depend on, as :func:`maskllm4v.runs.records.versions`; None: not installed."""
    return {name: _installed(name) for name in sorted((*PACKAGES, *TASK_PACKAGES.get(task, ())))}


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings of kernels that are exported and are not what the pin would set anyway.

    A value that holds more than a setting of a kernel could (a path, say) is left out.
    """
    found = {}
    for name in (*ENVIRONMENT, *UNPINNED):
        value = environment.get(name)
        if value is not None and value != ENVIRONMENT.get(name):
            found[name] = value if re.fullmatch(r"[A-Za-z0-9_ .,:=+-]{0,64}", value) else "(other)"
    return found


def setting_warning(name: str, value: str, exact: bool) -> str:
    """What became of an exported setting, in a line."""
    if exact and name in ENVIRONMENT:
        return f"{name}={value} was exported; exact runs override it with {_quoted(ENVIRONMENT[name])}"
    return f"{name}={value} was exported and applies{', for the pin does not set it' if exact else ''}"


def lock_warning(found: Mapping[str, tuple[str | None, str]], names: int = 2) -> str:
    """How an environment differs from the locked one, in a line; ``names``: of how many packages."""
    # those that results are known to depend on come first
    first = sorted(
        found, key=lambda name: name not in {*PACKAGES, *(n for more in TASK_PACKAGES.values() for n in more)}
    )
    said = [f"{name} {found[name][0] or 'missing'} (locked: {found[name][1]})" for name in first[:names]]
    more = f", {len(found) - names} more" if len(found) > names else ""
    return f"not the locked environment: {', '.join(said)}{more}"


def _quoted(value: str) -> str:
    return f"{value!r}" if " " in value else value


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
