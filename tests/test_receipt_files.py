"""Receipts as files: nothing private in them, damaged ones in a line, and those that are kept."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from import_graph import ROOT
from made_records import DIGITS
from receipt_project import EPYC, WANDA, change_metric, commit, make_checkout, run_stages

from maskllm4v.receipts import CPU, Receipt, Row, build_receipt, receipt_file, write_receipt
from maskllm4v.receipts.build import as_json, published_experiments
from maskllm4v.receipts.store import LARGEST, add_receipt, read_receipt, read_receipts, receipt_name
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import file_digest

XEON = CPU(name="Intel(R) Xeon(R) CPU @ 2.00GHz", architecture="x86_64", vendor="GenuineIntel", family=6, model=85)
HASWELL = CPU(name="Haswell", architecture="x86_64", family=6, model=60, avx2=True)
EXPERIMENTS = published_experiments(ROOT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkout(tmp_path_factory.mktemp("base") / "checkout")
    (folder / "requirements.lock").write_text(f"torch=={metadata.version('torch')}\n")
    commit(folder)
    return folder


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MKL_CBWR", "OMP_NUM_THREADS", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return shutil.copytree(base, tmp_path / "checkout")


def made(folder: Path, **known: Any) -> Receipt:
    return build_receipt(folder, DIGITS, **{"cpu": EPYC, **known})


# What is written


def test_files_have_sorted_keys_and_read_back(here: Path) -> None:
    change_metric(here, top1=83.412)
    found = made(here, begin=0.0)
    path = receipt_file(here, "digits")
    assert path == here / "receipt-digits.json"
    write_receipt(path, found)
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert read_receipt(path) == found
    facts = json.loads(text)
    assert (facts["format"], facts["table"], facts["chain"], facts["clean"]) == (1, "digits", "full", True)
    assert facts["cpu"]["model"] == 17
    assert facts["rows"][WANDA]["differences"] == [
        {"metric": "top1", "seed": 1, "committed": 83.5, "here": 83.412, "digit": 3}
    ]
    digest = file_digest(path)
    write_receipt(path, read_receipt(path))
    assert file_digest(path) == digest


def test_nothing_private_is_in_a_receipt(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"HOME": "/home/bobby", "USER": "bobby", "TOKEN": "s3cret", "ONEDNN_MAX_CPU_ISA": "/home/bobby/isa"}
    for name, value in secret.items():
        monkeypatch.setenv(name, value)
    change_metric(here, top1=1.0)
    text = json.dumps(as_json(made(here, begin=0.0, cpu=None)))
    private = {"bobby", "s3cret", str(here), here.parent.name, getpass.getuser(), socket.gethostname(), "example.org"}
    words = set(re.findall(r"[\w.@-]+", text))
    assert not {word for word in private if word in words}
    assert "bobby" not in text
    paths = re.findall(r'"(/[^"]*)"', text)
    assert paths == []


def test_git_ignores_this_machines_receipt() -> None:
    assert "/receipt-*.json" in (ROOT / ".gitignore").read_text().splitlines()


# What is read


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, r"cannot read .*: No such file"),
        (b"", "is not a receipt: it is not JSON"),
        (b"\xff\xfe", "is not a receipt: it is not JSON"),
        (b'{"format": 1', "is not a receipt: it is not JSON"),
        (b"[" * 100_000, "is not a receipt: it is not JSON"),
        (b"[1]", "is not a receipt: key 'format' is missing"),
        (b'{"rows": {}}', "is not a receipt: key 'format' is missing"),
        (b'{"format": 2}', "has format 2; this version reads 1"),
        (b'{"format": "1"}', "has format '1'; this version reads 1"),
        (b'{"format": NaN}', "has format nan; this version reads 1"),
        (b'{"format": 1}', "is not a receipt: table: Field required"),
        (b" " * (LARGEST + 1), "is not a receipt: it has more than 4 MiB"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "theirs.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=why) as caught:
        read_receipt(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_are_no_receipts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_receipt(tmp_path)


EDITS: dict[str, tuple[Any, str]] = {
    "unknown": ("x", "unknown: Extra inputs"),
    "cpu.name": ("x | y", "cpu.name: String should match"),
    "cpu.family": ("6", "cpu.family: Input should be a valid integer"),
    "cpu.model": (-1, "cpu.model: Input should be greater"),
    "table": ("<b>", "table: String should match"),
    "commit": ("main", "commit: String should match"),
    "warnings": (["a\nb"], r"warnings.0: String should match"),
    "settings": ({"MKL_CBWR": "/home/bob"}, r"settings.MKL_CBWR: String should match"),
    "seconds": (-1.0, "seconds: Input should be greater"),
    "rows": ({}, "rows: Dictionary should have at least 1 item"),
    "chain": ("half", "chain: Input should be 'full' or 'shortened'"),
    f"rows.{WANDA}.here": ("b" * 64, "its verdict is 'equal', but its digests say otherwise"),
    f"rows.{WANDA}.verdict": ("differs", "its verdict is 'differs', but nothing does"),
    f"rows.{WANDA}.differing": (["x"], "its verdict is 'equal', but it lists files that differ"),
    f"rows.{WANDA}.ran": (["guess"], r"ran.0: Input should be"),
    f"rows.{WANDA}.metrics": ({"0": {"top1": float("nan")}}, r"top1: Input should be a finite number"),
    "rows.\x1b[31m": ({"verdict": "not made"}, r"rows.\?\[31m.\[key\]: String should match"),
}


@pytest.mark.parametrize("place", EDITS)
def test_edited_files(here: Path, place: str) -> None:
    value, why = EDITS[place]
    facts = as_json(made(here))
    *folders, last = place.split(".")
    section = facts
    for folder in folders:
        section = section[folder]
    section[last] = value
    path = here / "theirs.json"
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=why) as caught:
        read_receipt(path)
    assert str(caught.value).isprintable()


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_foreign_json_is_one_line(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "foreign.json"
    for found in (value, {"format": 1, "rows": value}, {"format": value}):
        path.write_text(json.dumps(found))
        with pytest.raises(UserError, match=r"foreign\.json") as caught:
            read_receipt(path)
        assert "\n" not in str(caught.value)


# What is kept


def added(receipt: Receipt, here: Path) -> Path:
    return add_receipt(receipt, Path("receipt-digits.json"), EXPERIMENTS, here / "reports")


def names(here: Path) -> list[str]:
    return list(read_receipts(here / "reports"))


def test_added_receipts_hold_nothing_that_changes(here: Path) -> None:
    path = added(made(here, begin=0.0), here)
    assert path == here / "reports/receipts/digits-amd-epyc-25-17.json"
    kept = read_receipt(path)
    assert (kept.cores, kept.seconds, kept.stages) == (None, None, None)
    before = path.read_bytes()
    assert added(made(here, begin=99.0), here).read_bytes() == before
    assert names(here) == [path.name]
    other = EPYC.model_copy(update={"stepping": 2})
    assert added(made(here, cpu=other), here) == path  # the same CPU replaces it
    assert read_receipt(path).cpu.stepping == 2


def test_names(here: Path) -> None:
    found = made(here)
    assert receipt_name(found) == "digits-amd-epyc-25-17"
    assert receipt_name(found.model_copy(update={"cpu": XEON})) == "digits-intel-xeon-cpu-6-85"
    emulated = found.model_copy(update={"cpu": HASWELL, "emulator": "QEMU 7.2"})
    assert receipt_name(emulated) == "digits-haswell-6-60-qemu-7-2"
    arm = found.model_copy(update={"cpu": CPU(name="Apple M2", architecture="arm64"), "table": "dit_digits"})
    assert receipt_name(arm) == "dit_digits-apple-m2"


def test_failures_stay_as_history(here: Path) -> None:
    """A CPU's receipt whose rows differed is kept when results are replaced; one that agreed is not."""
    committed = (here / "reports/digits/runs").rename(here / "committed")
    shutil.copytree(committed, here / "reports/digits/runs")
    change_metric(here, top1=1.0)
    failed = made(here)
    first = added(failed, here)  # results lie here as this machine made them, so they are others than the commit's
    assert first.name == f"digits-amd-epyc-25-17-before-{(failed.results or '')[:8]}.json"
    first.unlink()
    shutil.rmtree(here / "reports/digits/runs")
    shutil.copytree(committed, here / "reports/digits/runs")
    assert added(failed, here).name == "digits-amd-epyc-25-17.json"  # today's
    change_metric(here, top1=1.0)
    commit(here)
    added(made(here), here)
    assert names(here) == [first.name, "digits-amd-epyc-25-17.json"]
    kept = read_receipts(here / "reports")
    assert [found.agrees for found in kept.values()] == [False, True]
    change_metric(here, top1=2.0)
    commit(here)
    added(made(here), here)
    assert names(here) == [first.name, "digits-amd-epyc-25-17.json"]  # the one in between told nothing


def test_emulated_receipts_stand_beside_real_ones(here: Path) -> None:
    added(made(here), here)
    rows = {"train@digits-x": Row.compared("a" * 64, "a" * 64)}
    found = made(here, cpu=HASWELL, emulator="QEMU 7.2", chain="shortened", rows=rows)
    assert added(found, here).name == "digits-haswell-6-60-qemu-7-2.json"
    assert len(names(here)) == 2


Change = dict[str, Any]
REFUSED: dict[str, tuple[Change, str]] = {
    "unclean": ({"clean": False}, r"proves nothing: the tree differed from commit [0-9a-f]{12} in code or settings"),
    "no commit": ({"commit": None, "clean": None}, "proves nothing: its results were not compared with a commit"),
    "no results": ({"results": None}, "proves nothing: its results were not compared with a commit"),
    "unlocked": (
        {"locked": False, "unlocked": {"torch": ("2.0", "2.1")}},
        r"proves nothing: it is not from the locked environment \(torch 2.0\)",
    ),
    "no lock": ({"locked": None}, r"it is not from the locked environment \(no requirements.lock\)"),
    "setting": ({"settings": {"GLIBC_TUNABLES": "x"}}, "GLIBC_TUNABLES was exported, which the pin does not set"),
    "recording": ({"exact": False}, r"table 'digits' is a recording \(exact: false\)"),
    "recorded table": ({"table": "cifar10"}, r"table 'cifar10' is a recording \(exact: false\)"),
    "other table": ({"table": "pets"}, "no table 'pets' here; allowed: digits, digits_detection, digits_patterns, "),
    "shortened": ({"chain": "shortened"}, "its chain was shortened, which counts on emulated CPUs only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_receipts_that_prove_nothing_are_refused(here: Path, case: str) -> None:
    changed, why = REFUSED[case]
    with pytest.raises(UserError, match=rf"^receipt-digits\.json.*{why}"):
        added(made(here).model_copy(update=changed), here)
    assert not (here / "reports/receipts").exists()


def test_pinned_settings_do_no_harm(here: Path) -> None:
    assert added(made(here).model_copy(update={"settings": {"MKL_CBWR": "AVX2"}}), here).exists()


def test_rows_that_prove_nothing_are_refused(here: Path) -> None:
    found = made(here)
    less = {row: one for row, one in found.rows.items() if row != WANDA}
    with pytest.raises(UserError, match=f"its rows are not the table's: {WANDA}"):
        added(found.model_copy(update={"rows": less}), here)
    with pytest.raises(UserError, match=f"row '{WANDA}' is not made"):
        added(found.model_copy(update={"rows": {**less, WANDA: Row(verdict="not made")}}), here)
    shutil.rmtree(here / ".cache")
    with pytest.raises(UserError, match="row 'digits-dense' was not computed on that machine; `dvc repro --force`"):
        added(made(here), here)
    run_stages(here, DIGITS, "evaluate")
    assert not read_receipt(added(made(here), here)).complete
