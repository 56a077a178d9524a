"""What runs and compares stages on emulated CPUs, with stages made up for it and an emulator that emulates nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT
from small_digits import experiment as small_experiment

from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.utils.errors import UserError
from scripts import emulate as command
from scripts.emulation import running
from scripts.emulation.processes import NATIVE, WorkerError, emulator, emulator_version
from scripts.emulation.running import Outcome, Result

# Says that it is QEMU, knows two CPUs, and runs commands as they are, in an environment that tells their CPU.
QEMU = """#!/bin/sh
test "$1" != --version || { echo "qemu-x86_64 version 9.1.22 (made up)"; exit 0; }
case "$2" in Haswell|EPYC) ;; *) echo "unable to find CPU model '$2'" >&2; exit 1;; esac
export MADE_UP_CPU="$2"
shift 2
exec "$@"
"""
# One stage for all: writes what it read, and does what its row is called.
STAGE = """
import json, os, signal, sys, threading
from pathlib import Path

def run(stage):
    row, cpu = sys.argv[1], os.environ.get("MADE_UP_CPU", "native")
    read = sorted(p.as_posix() for p in Path().rglob("*") if p.is_file())
    assert "params.yaml" in read
    folder = Path("artifacts/data" if stage == "prepare" else "artifacts", row)
    folder.mkdir(parents=True)
    (folder / "read.json").write_text(json.dumps(read))
    (folder / "value.txt").write_text("one\\n" + ("other\\n" if row == "differs" and cpu == "EPYC" else "two\\n"))
    Path(".cache").mkdir()
    Path(".cache/timings.txt").write_text(f"{os.getpid()}")
    print(f"{row} on {cpu}")
    if cpu != "native":
        if row == "more":
            (folder / "more.txt").write_text("only there")
        if row == "crashes":
            raise ArithmeticError("made up")
        if row == "says":
            sys.exit("prior says: no such thing")
        if row == "killed":
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    if row == "never":
        sys.exit(3)

if __name__ == "__main__":
    run(Path(sys.argv[0]).stem)
"""
DVC = """
stages:
  prepare:
    foreach: ["${data.name}"]
    do: {cmd: "python -m stages.prepare ${item}", deps: [stages], outs: ["artifacts/data/${item}"]}
  dense:
    foreach: ["${dense.row}"]
    do: {cmd: "python -m stages.dense ${item}", deps: ["artifacts/data/${data.name}"], outs: ["artifacts/${item}"]}
  prior:
    foreach: ${priors}
    do: {cmd: "python -m stages.prior ${key}", deps: ["artifacts/${dense.row}"], outs: [{"artifacts/${key}": {}}]}
  report: {cmd: python -m stages.report, deps: [reports], outs: [table.md]}
"""
ROWS = ("equal", "differs", "more", "crashes", "says", "killed")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with stages of no substance, as ``dvc.yaml`` calls them; and ``bin``, with the emulator."""
    root = tmp_path_factory.mktemp("root")
    (root / "stages").mkdir()
    (root / "stages" / "__init__.py").write_text("")
    for stage in ("prepare", "dense", "prior"):
        (root / "stages" / f"{stage}.py").write_text(STAGE.replace("Path(sys.argv[0]).stem", repr(stage)))
    (root / "dvc.yaml").write_text(DVC)
    (root / "bin").mkdir()
    script = root / "bin" / "qemu-x86_64"
    script.write_text(QEMU)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return root


def rows(*names: str) -> Experiment:
    """A table with a prior for each name, each of a kind of its own."""
    raw = small_experiment().model_dump(mode="json")
    raw |= {
        "priors": {row: {"method": f"method of {row}"} for row in names},
        "rows": dict.fromkeys(("dense", *names), ""),
    }
    return parse_experiment({**raw, "learned": {}, "updated": {}, "finetuned": {}})


def emulated(root: Path, experiment: Experiment, folder: Path, *cpus: str) -> tuple[Result, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("DVC_ROOT", "elsewhere")
        shown: list[str] = []
        return running.emulate({"t": experiment}, cpus, folder, root=root, show=shown.append), shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(made_up: Path, folder: Path) -> tuple[Result, list[str]]:
    """All rows, on both CPUs."""
    return emulated(made_up, rows(*ROWS), folder, "Haswell", "EPYC")


def outcome(result: Result, row: str, cpu: str) -> Outcome:
    return result.of_table("t", cpu)[f"prior@{row}"]


@pytest.mark.parametrize("cpu", ["Haswell", "EPYC"])
def test_all_kinds_run_on_each_cpu(cpu: str, found: tuple[Result, list[str]]) -> None:
    names = ["prepare@digits", "dense@dense", *(f"prior@{row}" for row in ROWS)]
    result, _ = found
    assert [o.call.name for o in result.outcomes if o.cpu == cpu] == names
    assert list(result.of_table("t", cpu)) == names
    assert [outcome(result, row, cpu).equal for row in ROWS] == [True, cpu == "Haswell", *[False] * 4]
    assert not result.equal


def test_a_difference_is_named(found: tuple[Result, list[str]]) -> None:
    differs, same = (outcome(found[0], "differs", cpu) for cpu in ("EPYC", "Haswell"))
    assert [str(d) for d in differs.differences] == [
        "artifacts/differs/value.txt: line 2: 'two' natively, 'other' there"
    ]
    assert differs.native == same.native == same.digest != differs.digest
    assert str(differs).startswith("DIFFERS EPYC")
    assert [str(d) for d in outcome(found[0], "more", "EPYC").differences] == [
        "artifacts/more/more.txt: not written natively"
    ]


FAULTS = {
    "crashes": ("ended with status 1", "ArithmeticError: made up"),
    "says": ("ended with status 1", "prior says: no such thing"),
    "killed": ("ended with signal 9", "killed on Haswell"),
}


@pytest.mark.parametrize("row", FAULTS)
def test_a_stage_that_fails_there_is_reported_with_what_it_printed(row: str, found: tuple[Result, list[str]]) -> None:
    ended, said = FAULTS[row]
    failed = outcome(found[0], row, "Haswell")
    lines = failed.fault.splitlines()
    assert (lines[0], lines[-1]) == (ended, said)
    assert (failed.digest, failed.equal) == ("", False)
    assert str(failed).startswith("FAILED  Haswell")
    assert said in str(failed)


def test_each_outcome_is_shown(found: tuple[Result, list[str]]) -> None:
    result, shown = found
    assert sorted(shown) == sorted(map(str, result.outcomes))
    assert len(shown) == 2 * (2 + len(ROWS))


def test_calls_see_their_inputs_and_nothing_else(folder: Path, found: tuple[Result, list[str]]) -> None:
    for cpu in (NATIVE, "Haswell"):
        text = (folder / cpu / "t" / "prior-equal" / "project" / "artifacts" / "equal" / "read.json").read_text()
        assert text == '["artifacts/dense/read.json", "artifacts/dense/value.txt", "params.yaml"]'


def test_costs_and_kernels_are_told(found: tuple[Result, list[str]]) -> None:
    result, _ = found
    assert result.emulator == "QEMU 9.1"
    assert result.kernels.keys() == result.seconds.keys() == {NATIVE, "Haswell", "EPYC"}
    assert all(found.keys() == {"torch", "numpy"} for found in result.kernels.values())
    assert min(result.seconds.values()) > 0
    assert all(o.seconds >= 0 for o in result.outcomes)


def test_a_stage_that_fails_natively_ends_it_all(made_up: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t prior@never: failed natively\nended with status 3\nnever on native$"):
        emulated(made_up, rows("never", "equal"), tmp_path, "Haswell")


def test_a_cpu_that_the_emulator_lacks(made_up: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"CPU 'Z80' ended with status 1:\nunable to find CPU model 'Z80'$"):
        emulated(made_up, rows("equal"), tmp_path, "Z80")


def test_no_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert emulator() is None
    assert emulator_version() == ""
    with pytest.raises(WorkerError, match="qemu-user"):
        running.emulate({"t": rows("equal")}, ["Haswell"], tmp_path / "runs", root=ROOT)


# The command


def test_command_needs_an_exact_table() -> None:
    with pytest.raises(SystemExit, match="emulate: no exact table 'cifar10'; allowed: digits, "):
        command.main(["--table", "digits", "cifar10"])


@pytest.mark.parametrize("equal", [True, False])
def test_exit_status(equal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*given: Any) -> Result:
        assert given[:2] == (["EPYC", "Haswell"], None)
        call = running.Call("t", "prior", "p", (), ())
        outcomes = [Outcome(call, cpu, 1.0, "a", "a", fault="" if equal else "x") for cpu in given[0]]
        return Result(outcomes, {call: call}, "QEMU 7.2", {"EPYC": {"torch": "AVX2"}}, {"EPYC": 12.3})

    monkeypatch.setattr(command, "run", run)
    assert command.main(["--cpu", "EPYC", "--cpu", "Haswell"]) == (not equal)
    assert capsys.readouterr().out == f"EPYC: 12 s of CPU; kernels: torch AVX2\n{2 if equal else 0} of 2 equal\n"
