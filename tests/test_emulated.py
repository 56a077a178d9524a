"""Each kind of stage of each exact table writes the same bytes here and on emulated CPUs: a Haswell and an EPYC."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from import_graph import ROOT

from maskllm4v.receipts.store import read_receipt
from scripts.emulate import CPUS, run, write_receipts
from scripts.emulation.processes import NATIVE, emulator
from scripts.emulation.running import Result
from scripts.emulation.shortened import exact_tables

TABLES = exact_tables(ROOT)


def require_emulator() -> None:
    """Skip where QEMU is not to be had, but for continuous integration, where this test must not be missed."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"this is {platform.machine()}: exactness is for x86-64")
    if emulator() is None:
        why = "qemu-x86_64 is not installed (Debian's package qemu-user), so no other CPU was tried"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    require_emulator()
    return run(CPUS, None, tmp_path_factory.mktemp("emulated"))


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_all_bytes_are_equal(cpu: str, result: Result) -> None:
    found = [outcome for outcome in result.outcomes if outcome.cpu == cpu]
    assert found
    assert [str(outcome) for outcome in found if not outcome.equal] == []


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("table", TABLES)
def test_every_row_was_made_and_measured(table: str, cpu: str, result: Result) -> None:
    makers = {"dense": "dense", "oneshot": "prior", "learned": "train", "updated": "update", "finetuned": "finetune"}
    experiment, found = TABLES[table], result.of_table(table, cpu)
    wanted = {f"{makers[experiment.row(row).kind]}@{row}" for row in experiment.rows}
    wanted |= {f"evaluate@{row}" for row in experiment.rows} | {f"export@{row}" for row in experiment.exports}
    assert found.keys() == wanted | {f"prepare@{experiment.data.name}"}
    assert all(outcome.digest for outcome in found.values())


@pytest.mark.slow
def test_kernels_are_the_pinned_ones_everywhere(result: Result) -> None:
    assert result.kernels.keys() == {NATIVE, *CPUS}
    assert {tuple(sorted(found.items())) for found in result.kernels.values()} == {
        (("numpy", "X86_V3"), ("torch", "AVX2"))  # x86-64-v3 is what AVX2 belongs to
    }


@pytest.mark.slow
def test_receipts_say_what_was_compared(result: Result, tmp_path: Path) -> None:
    found = {path.name: read_receipt(path) for path in write_receipts(result, tmp_path)}
    assert found.keys() == {f"receipt-{table}-{cpu}.json" for table in TABLES for cpu in CPUS}
    for receipt in found.values():
        assert (receipt.chain, receipt.emulator, receipt.agrees) == ("shortened", result.emulator, result.equal)
        assert receipt.rows.keys() == result.of_table(receipt.table, receipt.cpu.name).keys()


# The rule itself


def test_without_an_emulator_ci_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="qemu-user"):
        require_emulator()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="qemu-user"):
        require_emulator()


def test_exactness_is_not_for_other_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match="aarch64"):
        require_emulator()
