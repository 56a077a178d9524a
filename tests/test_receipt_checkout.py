"""Receipts of a checkout: what ran there, which commit it is, and whether code and settings are the commit's."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from made_records import DIGITS
from receipt_project import WANDA, commit, first_line, git, receipt, run_stages, said, snapshot

from maskllm4v.config import load_experiment
from maskllm4v.receipts import CPU, Row
from maskllm4v.receipts.rows import results_here
from maskllm4v.receipts.text import duration, verdict
from maskllm4v.runs.paths import run_folder

RESULTS = Path("reports/digits/runs")


@pytest.fixture
def here(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MKL_CBWR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return shutil.copytree(checkout, tmp_path / "checkout")


# What ran


def test_rows_that_did_not_run_are_not_said_to_be_reproduced(here: Path) -> None:
    shutil.rmtree(here / ".cache")
    found = receipt(here)
    assert (found.agrees, found.complete) == (True, False)
    assert first_line(found) == "– digits: all 25 rows are as committed, but none was computed on this machine"
    run_stages(here, DIGITS, "evaluate", "update")
    text = said(receipt(here), 1000)
    assert text.startswith("✔ digits: all 25 rows are equal")
    updated = len(DIGITS.updated)
    assert f"note: {updated} of 25 rows were not computed on this machine: DVC found them made" in text
    assert f"note: {25 - updated} of 25 rows came out equal and so were not measured again" in text


def test_seconds_and_stages(here: Path) -> None:
    begin = time.time() - 612
    run_stages(here, DIGITS)  # just now
    found = receipt(here, begin=begin)
    stages = sum(1 for _ in (here / ".cache/timings").iterdir())
    assert found.seconds == pytest.approx(612, abs=60)
    assert found.stages == stages
    assert f", in 10 min {(found.seconds or 0) - 600:.0f} s ({stages} stages run)" in said(found, 1000)
    for path in (here / ".cache/timings").iterdir():
        os.utime(path, (begin - 1, begin - 1))
    assert "(nothing had to run: DVC found everything made)" in said(receipt(here, begin=begin), 1000)
    os.utime(here / f".cache/timings/prior@{WANDA}.json")
    assert "(1 stage run)" in said(receipt(here, begin=begin), 1000)
    assert receipt(here, begin=time.time() + 99).seconds == 0  # a clock that was set back
    assert " in " not in said(receipt(here)).splitlines()[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (612, "10 min 12 s"), (3599.7, "1 h 0 min"), (7380, "2 h 3 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Where there is nothing to compare with


@pytest.mark.parametrize(
    ("without", "why"),
    [
        ("git", "git is not installed"),
        ("checkout", "this is no git checkout"),
        ("commit", "this checkout has no commit yet"),
        ("folder", "this folder was never committed"),
        ("tree", "git cannot read the commit"),
        ("file", "git cannot read the commit"),
    ],
)
def test_without_a_commit(here: Path, without: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if without == "git":
        monkeypatch.setenv("PATH", str(here / "bin"))
    elif without in ("tree", "file"):  # a damaged repository
        lost = git(here, "rev-parse", "HEAD^{tree}" if without == "tree" else "HEAD:dvc.lock").strip()
        (here / ".git" / "objects" / lost[:2] / lost[2:]).unlink()
    else:
        shutil.rmtree(here / ".git")
    if without == "commit":
        git(here, "init", "-q")
    if without == "folder":  # inside somebody's own repository
        git(here.parent, "init", "-q")
        git(here.parent, "commit", "-qm", "nothing", "--allow-empty")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(here.parent.parent))
    found = receipt(here)
    assert (found.commit, found.clean, found.results) == (None, None, None)
    assert found.named("not committed") == list(DIGITS.rows)
    assert found.warnings == [f"nothing to compare with: {why}"]
    assert first_line(found) == "– digits: 25 of 25 rows are made; there is nothing to compare with"


def test_checkout_inside_a_larger_one(checkout: Path, tmp_path: Path) -> None:
    inner = shutil.copytree(checkout, tmp_path / "all" / "of" / "it", ignore=shutil.ignore_patterns(".git"))
    git(tmp_path / "all", "init", "-q")
    commit(tmp_path / "all")
    (tmp_path / "all" / "else.py").write_text("changed beside it")
    found = receipt(inner)
    assert found.agrees
    assert found.clean
    (inner / "maskllm4v" / "code.py").write_text("two\n")
    assert not receipt(inner).clean


# Whether code and settings are the commit's


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("reports/digits/runs/x.json", True),
        ("README.md", True),
        ("dvc.lock", True),
        ("notes.txt", True),
        ("maskllm4v/new.py", False),
        ("maskllm4v/code.py", False),
        ("experiments/digits.yaml", False),
        ("requirements.lock", False),
    ],
)
def test_clean_tree(here: Path, path: str, clean: bool) -> None:
    assert receipt(here).clean
    with (here / path).open("a") as stream:
        stream.write("# changed\n")
    assert receipt(here).clean is clean


def test_deleted_and_renamed_code_is_a_change(here: Path) -> None:
    git(here, "mv", "maskllm4v/code.py", "maskllm4v/other.py")
    assert not receipt(here).clean


def test_params_may_hold_any_committed_experiment(here: Path) -> None:
    other = (here / "experiments" / "dit_digits.yaml").read_text()
    (here / "params.yaml").write_text(other.replace("seed_processes: 0", "seed_processes: 1"))  # changes no result
    assert other.replace("seed_processes: 0", "seed_processes: 1") != other
    experiment = load_experiment(here / "params.yaml")
    assert receipt(here, experiment).clean
    (here / "params.yaml").write_text(other.replace("seeds: [0, 1, 2]", "seeds: [0, 1]"))
    assert not receipt(here, load_experiment(here / "params.yaml")).clean


# The rest


def test_a_receipt_changes_nothing(here: Path) -> None:
    before = snapshot(here)
    index = (here / ".git" / "index").read_bytes()
    receipt(here)
    assert snapshot(here) == before
    assert (here / ".git" / "index").read_bytes() == index


def test_shortened_chains_give_their_own_rows(here: Path) -> None:
    haswell = CPU(name="Haswell", architecture="x86_64", family=6, model=60, avx2=True)
    rows = {"train@digits-x": Row.compared("a" * 64, "a" * 64), "dense@digits-dense": Row.compared("b" * 64, "b" * 64)}
    found = receipt(here, cpu=haswell, emulator="QEMU 7.2", chain="shortened", rows=rows)
    assert (found.agrees, found.complete, found.cores) == (True, True, None)
    assert found.results == results_here(DIGITS, here / "reports")
    assert verdict(found) == [
        "✔ digits: all 2 rows are equal to those on a real CPU, to the last bit",
        "  on Haswell (family 6, model 60), emulated by QEMU 7.2",
    ]
    rows["dense@digits-dense"] = Row.compared("b" * 64, "c" * 64)
    found = receipt(here, cpu=haswell, emulator="QEMU 7.2", chain="shortened", rows=rows)
    assert found.named("differs") == ["dense@digits-dense"]
    assert "dense@digits-dense  other results" in said(found)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_prose_fits_the_terminal(here: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    shutil.rmtree(here / RESULTS / WANDA)
    lines = verdict(receipt(here, begin=0.0), width)
    prose = [line for line in lines if not line.startswith(("next:", "      "))]
    assert max(map(len, prose)) <= width
    assert run_folder("digits", WANDA).as_posix() == f"{RESULTS}/{WANDA}"
