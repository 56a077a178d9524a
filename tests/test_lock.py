"""``requirements.lock`` has what ``pyproject.toml`` asks for, and ``make lock`` moves none of its pins."""

from __future__ import annotations

import re
import subprocess
import tomllib
from itertools import pairwise

import pytest
from import_graph import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"].values()
ASKED = [Requirement(text) for texts in (PROJECT["project"]["dependencies"], *EXTRAS) for text in texts]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_what_the_project_asks_for_is_locked(asked: Requirement) -> None:
    assert canonicalize_name(asked.name) in PINS, "run make lock"
    assert PINS[canonicalize_name(asked.name)] in asked.specifier


def test_locking_keeps_the_pins() -> None:
    command = ["make", "-n", "-C", str(ROOT), "--no-print-directory", "lock"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    compiled = said.replace("\\\n", "").splitlines()[-1].split()
    assert compiled[1:4] == ["pip", "compile", "-q"]
    options = dict(pairwise(compiled))
    assert options["--constraint"] == options["--output-file"] == "requirements.lock"
    assert {"--all-extras", "--universal", "--generate-hashes"} <= set(compiled)
