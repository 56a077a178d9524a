"""What records say of the machine that a row was made on."""

from __future__ import annotations

import platform

import pytest
import torch
from made_records import DIGITS

from maskllm4v.runs.provenance import PINNED, where
from maskllm4v.utils.devices import hardware

LOOSE = DIGITS.model_copy(update={"exact": False})


@pytest.mark.parametrize(("machine", "pinned"), [("x86_64", True), ("AMD64", True), ("aarch64", False)])
def test_exact_runs_say_what_they_were_held_to(machine: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not which CPU it was, or records would differ; and nothing of CPUs that did not run it."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    here = hardware(torch.device("cpu"))
    assert where(DIGITS) == {"hardware": PINNED if pinned else here, "world_size": 1}
    assert where(LOOSE) == {"hardware": here, "world_size": 1}
    assert PINNED == "x86-64 CPU, pinned kernels, one thread"


def test_exact_settings_on_a_gpu_are_no_pinned_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskllm4v.runs.provenance.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("maskllm4v.runs.provenance.hardware", lambda _: "a GPU")
    assert where(DIGITS)["hardware"] == where(LOOSE)["hardware"] == "a GPU"
