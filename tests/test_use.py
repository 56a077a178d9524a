"""Switching params.yaml to another experiment; DVC, unlike us, knows no defaults."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import run, well
from import_graph import ROOT

LINES = {  # what may be left out, an experiment that has it, and what has to be added for DVC
    "updated: {}": ("imagenet_vit_b16", "updated: {}"),
    "finetuned: {}": ("digits", "finetuned: {}"),
    "evaluation: {}": ("digits", "evaluation: {}"),
    'pattern: "2:4"': ("digits", 'pattern: "2:4"'),
    "  name: classification": ("digits", "name: classification in task"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml")))
def test_every_experiment_can_be_used(name: str, here: Path) -> None:
    assert f"params.yaml is now experiments/{name}.yaml" in well("use", name).out
    assert (here / "params.yaml").read_bytes() == (here / "experiments" / f"{name}.yaml").read_bytes()


@pytest.mark.parametrize("line", LINES)
def test_what_dvc_needs_is_named(line: str, here: Path) -> None:
    experiment, hint = LINES[line]
    text = (here / "experiments" / f"{experiment}.yaml").read_text()
    text = re.sub(r"^table: .*", "table: pets", text, flags=re.MULTILINE)
    left = [kept for kept in text.splitlines(keepends=True) if not kept.startswith(line)]
    assert len(left) == text.count("\n") - 1
    (here / "experiments" / "pets.yaml").write_text("".join(left))
    (here / "params.yaml").write_text("before")
    done = run("use", "pets")
    assert done.code == 1
    assert done.err == (f"use: experiments/pets.yaml: dvc.yaml reads these, too, so they have to stand there: {hint}\n")
    assert (here / "params.yaml").read_text() == "before"


def test_edits_are_kept(here: Path) -> None:
    assert "edited" not in well("use", "own_masks").out
    assert "edited" not in well("use", "own_coco").out
    copies = []
    for steps in (7, 8):
        edited = (here / "params.yaml").read_text().replace("steps: 200", f"steps: {steps}")
        assert f"steps: {steps}" in edited
        (here / "params.yaml").write_text(edited)
        (copy,) = re.findall(
            r"^params\.yaml held edits of your own; they are kept in (\S+)$", well("use", "own_coco").out, re.M
        )
        copies.append(here / copy)
        assert copies[-1].read_text() == edited
    assert len(set(copies)) == 2
    assert (here / "params.yaml").read_bytes() == (here / "experiments/own_coco.yaml").read_bytes()


def test_unknown_experiment(here: Path) -> None:
    done = run("use", "digit")
    assert done.code == 1
    assert "no experiment 'digit'; allowed: ade20k_eomt_l, " in done.err
