"""What has to pass before a change lands: ``.ci/run``, with stand-ins for all that it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from import_graph import ROOT


def ci(folder: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """``.ci/run`` where there are no programs but these and the shell's; each writes down how it is called."""
    for name in ("bash", "env", "dirname"):
        (folder / name).symlink_to(shutil.which(name) or name)
    for name, text in programs.items():
        (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/log\n{text}\n')
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": str(folder)}
    return subprocess.run([ROOT / ".ci/run"], env=environment, capture_output=True, text=True, check=False)


INSTALL = ["apt-get -qq update", "apt-get -qq install -y --no-install-recommends qemu-user"]
RUN = ["make test", "make proof-ci"]


def test_ci_tests_and_proves(tmp_path: Path) -> None:
    assert ci(tmp_path, **{"qemu-x86_64": "", "make": '[ "$CI" = true ]'}).returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == RUN


@pytest.mark.parametrize("user", [0, 1000])
def test_ci_installs_the_emulator(user: int, tmp_path: Path) -> None:
    done = ci(tmp_path, **{"make": "", "apt-get": "", "sudo": 'shift; "$@"', "id": f"echo {user}"})
    assert done.returncode == 0, done.stderr
    log = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("id ")]
    assert [line for line in log if not line.startswith("sudo ")] == [*INSTALL, *RUN]
    assert [line for line in log if line.startswith("sudo ")] == (
        [f"sudo -n {line}" for line in INSTALL] if user else []
    )


@pytest.mark.parametrize("programs", [{}, {"apt-get": "exit 100"}], ids=["another system", "no network"])
def test_ci_stops_where_the_emulator_cannot_be_installed(programs: dict[str, str], tmp_path: Path) -> None:
    done = ci(tmp_path, **{"make": "", "id": "echo 0", **programs})
    assert done.returncode == 1
    assert "cannot install qemu-user" in done.stderr
    assert "make" not in (tmp_path / "log").read_text()


def test_ci_fails_with_its_tests(tmp_path: Path) -> None:
    assert ci(tmp_path, **{"qemu-x86_64": "", "make": "exit 2"}).returncode == 2
    assert (tmp_path / "log").read_text().splitlines() == RUN[:1]
