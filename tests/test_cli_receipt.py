"""``python -m maskllm4v receipt``, and the end of ``make repro``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from commands import run, well
from import_graph import ROOT
from made_records import DIGITS
from receipt_project import EPYC, WANDA, change_metric, commit, make_checkout

from maskllm4v.receipts import build_receipt, write_receipt
from maskllm4v.utils.io import read_json, write_json

OWN = "receipt-digits.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkout(tmp_path_factory.mktemp("base") / "checkout")
    (folder / "requirements.lock").write_text(f"torch=={metadata.version('torch')}\n")
    commit(folder)
    return folder


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(base, tmp_path / "checkout")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(folder)
    return folder


def theirs(here: Path) -> Path:
    """A receipt of another machine, where a row came out otherwise."""
    change_metric(here, top1=83.412)
    path = here / "theirs.json"
    write_receipt(path, build_receipt(here, DIGITS, cpu=EPYC.model_copy(update={"name": "Other"})))
    change_metric(here, top1=83.5)
    return path


def test_verdict_and_file(here: Path) -> None:
    done = well("receipt", "--since", "1.5")
    lines = done.out.splitlines()
    assert lines[0] == "✔ digits: all 25 rows are equal to the committed ones, to the last bit"
    assert "min (" in lines[1]
    assert lines[-1].endswith("  attach it to a bug report")
    assert all(step in done.out for step in ("make ui", "reports/digits/index.html", OWN))
    found = read_json(here / OWN)
    assert (found["table"], found["clean"], len(found["rows"])) == ("digits", True, 25)


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--check",), 1)])
def test_differing_rows_fail_only_a_check(here: Path, flags: tuple[str, ...], code: int) -> None:
    assert run("receipt", *flags).code == 0
    change_metric(here, top1=83.412)
    done = run("receipt", *flags)
    assert done.code == code
    assert "✘ digits: 1 of 25 rows differs" in done.out
    assert f"{WANDA}  3rd         top1/seed1       83.5  83.412" in done.out
    assert read_json(here / OWN)["rows"][WANDA]["verdict"] == "differs"


def test_check_fails_for_rows_that_are_not_made(here: Path) -> None:
    shutil.rmtree(here / "reports/digits/runs" / WANDA)
    assert run("receipt", "--check").code == 1


def test_compare_with_this_machine(here: Path) -> None:
    other = theirs(here)
    done = well("receipt", "--compare", str(other))
    assert "✘ digits: 1 of 25 rows differs, 24 equal" in done.out
    assert f"B {other}: Other (family 25, model 17)" in done.out
    assert done.out.startswith("A here: ")  # there is no file yet
    assert "CPU: " in done.out
    assert not (here / OWN).exists()
    well("receipt")
    done = well("receipt", "--compare", "theirs.json")
    assert done.out.startswith(f"A {OWN}: ")
    assert run("receipt", "--compare", "theirs.json", "--check").code == 1
    assert run("receipt", "--compare", "theirs.json", OWN, "--check").code == 1
    done = run("receipt", "--compare", OWN, OWN, "--check")
    assert done.code == 0
    assert "✔ digits: all 25 rows are equal in A and B, to the last bit" in done.out


def test_compare_where_nothing_is_made(here: Path) -> None:
    shutil.rmtree(here / "reports")
    well("receipt")
    done = well("receipt", "--compare", OWN, OWN)
    assert "– digits: no row is made in A or B" in done.out


def test_compare_names_what_else_differs(here: Path) -> None:
    other = theirs(here)
    facts = read_json(other)
    facts |= {"python": "3.12.1", "locked": False, "clean": False, "settings": {"MKL_CBWR": "AVX2"}}
    facts["versions"]["torch"] = "2.0"
    facts["unlocked"] = {"torch": ["2.0", "9.9"], "aiohttp": [None, "3.0"]}
    facts["rows"]["digits-ria"]["artifacts"] = {"artifacts/digits-ria": "f.dir"}
    facts["rows"]["digits-magnitude"] = {"verdict": "not made"}
    write_json(other, facts)
    lines = well("receipt", "--compare", "theirs.json").out.splitlines()
    for line in (
        f"maskllm4v: {facts['package']} in A, {facts['package']} in B",
        "system:",
    ):
        assert not any(found.startswith(line) for found in lines)  # the same
    assert "MKL_CBWR: not set in A, AVX2 in B" in lines
    assert f"torch: {metadata.version('torch')} in A, 2.0 in B" in lines
    assert "aiohttp: 3.0 in A, missing in B" in lines
    assert any(line.startswith("Python: 3.") and line.endswith(" in A, 3.12.1 in B") for line in lines)
    assert any(line.endswith(" with changes in B") for line in lines)
    assert "  digits-ria        metrics equal; not equal: weights, masks or exports" in lines
    assert "  digits-magnitude  not made in B" in lines


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--compare", "missing.json"), "receipt: cannot read missing.json: No such file or directory"),
        (("--compare", "a", "b", "c"), "receipt: --compare takes one file or two, not 3"),
        (("--compare", "half.json"), "receipt: half.json is not a receipt: it is not JSON"),
        (("--add", "missing.json"), "receipt: cannot read missing.json"),
        (("--add",), f"receipt: cannot read {OWN}: No such file or directory"),
        (("--compare", "pets.json"), "receipt: no receipt-pets.json here to compare with; make it with `make use"),
        (("--compare", OWN, "pets.json"), "cannot be compared: their tables are 'digits' and 'pets'"),
        (("--compare", OWN, "short.json"), "cannot be compared: their chains are 'full' and 'shortened'"),
    ],
)
def test_wrong_files(here: Path, flags: tuple[str, ...], why: str) -> None:
    (here / "half.json").write_text("{")
    if "pets.json" in flags or "short.json" in flags:
        well("receipt")
        write_json(here / "pets.json", {**read_json(here / OWN), "table": "pets"})
        write_json(here / "short.json", {**read_json(here / OWN), "chain": "shortened"})
    done = run("receipt", *flags)
    assert done.code == 1
    assert why in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("flags", [("--add", "x", "--compare", "y"), ("--since", "now"), ("digits",)])
def test_wrong_flags(here: Path, flags: tuple[str, ...]) -> None:
    assert run("receipt", *flags).code == 2


def test_add(here: Path) -> None:
    well("receipt")
    done = well("receipt", "--add")
    (path,) = (here / "reports/receipts").glob("digits-*.json")
    assert done.out.splitlines()[0].startswith(f"{path.relative_to(here)}: 25 of 25 rows on ")
    assert done.out.splitlines()[1] == "next: python -m maskllm4v report"
    (here / "maskllm4v" / "code.py").write_text("two\n")
    well("receipt")
    done = run("receipt", "--add", OWN)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"receipt: {OWN} proves nothing: the tree differed from commit" in done.err


def test_without_settings_or_results(here: Path) -> None:
    shutil.rmtree(here / "reports")
    assert "no row is made yet" in well("receipt").out
    (here / "params.yaml").unlink()
    done = run("receipt")
    assert (done.code, done.err) == (1, "receipt: cannot read params.yaml: No such file or directory\n")


def test_neither_torch_nor_numpy_is_imported(here: Path) -> None:
    code = (
        "import sys; sys.argv[1:] = ['receipt']\n"
        "from maskllm4v.cli.main import main\n"
        "main()\n"
        "print([name for name in ('numpy', 'torch', 'pandas', 'mlflow', 'dvc') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# make repro


@pytest.mark.parametrize("code", [0, 3])
def test_make_repro_ends_with_the_verdict(here: Path, code: int, tmp_path: Path) -> None:
    """Also where rows differ; but not where the pipeline fails."""
    change_metric(here, top1=83.412)
    shutil.copy(ROOT / "Makefile", here / "Makefile")
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "dvc").write_text(f'#!/bin/sh\ntest "$*" = repro && exit {code}\nexit 9\n')
    (venv / "bin" / "dvc").chmod(0o755)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    (here / "pyproject.toml").touch()
    for stamp in (".installed", ".command"):  # one after the other, as make looks at their times
        (venv / stamp).touch()
    (here / "mlruns" / "published").mkdir(parents=True)
    command = ["make", "-s", "repro", f"VENV={venv}"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is (code == 0), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "dvc repro"
    assert (here / OWN).exists() is (code == 0)
    if code == 0:
        assert lines[1].startswith("✘ digits: 1 of 25 rows differs from the committed one")
        assert json.loads((here / OWN).read_text())["seconds"] < 3600
