"""What records say of the machine that a row was made on, and which artifacts belong to a row's settings."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_records import DIGITS

from maskllm4v.runs.paths import origin_file
from maskllm4v.runs.provenance import PINNED, read_origin, where, write_origin
from maskllm4v.utils.devices import hardware
from maskllm4v.utils.errors import CheckpointError
from maskllm4v.utils.io import read_json, write_json

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


# Settings that artifacts were made with

ROW = "digits-hybrid-long"  # the longest chain
Change = Callable[[dict[str, Any]], object]


def written(change: Change, folder: Path) -> Path:
    """What lies beside a row's artifacts, changed."""
    write_origin(DIGITS, ROW)
    path = folder / origin_file(ROW)
    found = read_json(path)
    change(found["settings"])
    write_json(path, found)
    return path


FITTING: dict[str, Change] = {
    "as it is": lambda settings: None,
    "a table's other name": lambda settings: settings.update(table="other"),
    "from before a setting": lambda settings: settings["dense"].pop("accumulate"),
    "from before a setting of a row's start": lambda settings: settings["start"]["update"].pop("target"),
    "from before a section": lambda settings: settings["model"].pop("input"),
}
OTHER: dict[str, Change] = {
    "another value": lambda settings: settings["dense"].update(steps=999),
    "not the default": lambda settings: settings["dense"].update(accumulate=2),
    "not the default of a section inside": lambda settings: settings["model"]["input"].update(crop_pct=0.9),
    "more": lambda settings: settings["dense"].update(more=1),
    "less than differs": lambda settings: settings["dense"].pop("steps"),
    "another argument": lambda settings: settings["model"]["args"].update(more=1),
    "one argument less": lambda settings: settings["model"]["args"].pop("depth"),
    "another start": lambda settings: settings["start"]["prior"].update(method="wanda"),
    "no section": lambda settings: settings.pop("learning"),
    "a section that is none": lambda settings: settings.update(dense=[]),
    "nothing": lambda settings: settings.clear(),
}


def test_origin_holds_all_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_json(written(FITTING["as it is"], tmp_path))["settings"] == DIGITS.row(ROW).made_with()


@pytest.mark.parametrize("change", FITTING.values(), ids=FITTING)
def test_artifacts_of_the_same_settings_are_taken(
    change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(change, tmp_path)
    assert read_origin(DIGITS, ROW) == where(DIGITS)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_artifacts_of_other_settings_are_refused(
    change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(change, tmp_path)
    with pytest.raises(CheckpointError, match=r"made\.json: these artifacts were made with other settings; make them"):
        read_origin(DIGITS, ROW)


@pytest.mark.parametrize("content", [[], {}, {"settings": None}, {"settings": []}])
def test_what_is_no_origin_is_refused(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(origin_file(ROW), content)
    with pytest.raises(CheckpointError, match="other settings"):
        read_origin(DIGITS, ROW)
