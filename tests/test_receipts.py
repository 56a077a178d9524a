"""Receipts of a checkout: which rows came out as committed, what of the others did not, and what is said of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_records import DIGITS, make_records
from receipt_project import (
    WANDA,
    change_metric,
    change_record,
    commit,
    first_line,
    git,
    make_checkout,
    receipt,
    said,
    write_lock,
)

from maskllm4v.config import Experiment
from maskllm4v.receipts.rows import results_digest, results_here, row_digest, table_files
from maskllm4v.runs.paths import curve_file, layers_file, record_file
from maskllm4v.runs.records import run_digest
from maskllm4v.utils.errors import UserError

LOOSE = DIGITS.model_copy(update={"exact": False})
RESULTS = Path("reports/digits/runs")


@pytest.fixture
def here(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MKL_CBWR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return shutil.copytree(checkout, tmp_path / "checkout")


# Rows


def test_equal_rows(here: Path) -> None:
    found = receipt(here)
    assert found.agrees
    assert found.complete
    assert list(found.rows) == list(DIGITS.rows)
    row = found.rows[WANDA]
    assert row.here == row.committed == run_digest(here / RESULTS / WANDA)
    assert row.artifacts == {f"artifacts/{WANDA}": f"{WANDA}.dir"}
    assert (row.ran, row.differences, row.differing) == (["prior", "evaluate"], [], [])
    assert row.metrics["1"]["top1"] == 83.5
    assert first_line(found) == "✔ digits: all 25 rows are equal to the committed ones, to the last bit"


def test_digests_are_those_of_records(here: Path) -> None:
    """What git gives and what lies in folders has one digest, and what is rendered from it has no part in it."""
    files = table_files(here, DIGITS)
    folder = f"{RESULTS.as_posix()}/{WANDA}/"
    own = {name.removeprefix(folder): content for name, content in files.items() if name.startswith(folder)}
    assert row_digest(own) == run_digest(here / RESULTS / WANDA)
    assert row_digest({}) is None
    before = results_digest(DIGITS, files)
    assert before == results_here(DIGITS, here / "reports") == receipt(here).results
    (here / "reports" / "digits" / "table.md").write_text("rendered")
    (here / "README.md").write_text("rendered")
    assert results_here(DIGITS, here / "reports") == before
    change_metric(here, top1=1.0)
    assert results_here(DIGITS, here / "reports") != before
    assert receipt(here).results == before  # the commit's
    shutil.rmtree(here / RESULTS)
    assert results_here(DIGITS, here / "reports") is None


def test_metrics_that_differ(here: Path) -> None:
    change_metric(here, seed=0, top1=82.0004)
    change_metric(here, seed=2, nll=0.5211)
    found = receipt(here)
    row = found.rows[WANDA]
    assert (row.verdict, found.named("differs")) == ("differs", [WANDA])
    told = [(d.metric, d.seed, d.committed, d.here, d.digit) for d in row.differences]
    assert told == [("top1", 0, 82.0, 82.0004, 6), ("nll", 2, 0.52, 0.5211, 3)]
    assert row.differing == []  # the record, apart from its metrics
    assert first_line(found).startswith(
        "✘ digits: 1 of 25 rows differs from the committed one; 24 of 25 rows are equal"
    )
    lines = said(found).splitlines()
    assert lines[3].split() == ["row", "from", "digit", "metric", "committed", "here"]
    assert lines[4].split() == [WANDA, "3rd", "nll/seed2", "0.52", "0.5211", "and", "1", "more"]
    assert lines[-3].startswith("next: receipt-digits.json")


@pytest.mark.parametrize(
    ("damage", "differing"),
    [
        ("curves", "curves/seed1.csv"),
        ("layers", "layers.csv"),
        ("extra", "picture.png"),
        ("lost", "layers.csv"),
        ("weights", "weights or masks"),
        ("exports", "exported files"),
        ("versions", "record.json (versions)"),
        ("inputs", "record.json (inputs)"),
    ],
)
def test_rows_with_equal_metrics_name_what_differs(here: Path, damage: str, differing: str) -> None:
    row, reports = "digits-maskllm-long-magnitude", here / "reports"
    match damage:
        case "curves":
            curve_file("digits", row, 1, reports).write_text("step,loss\n0,1\n")
        case "layers":
            layers_file("digits", row, reports).write_text("seed,layer\n0,head\n")
        case "extra":
            (record_file("digits", row, reports).parent / "picture.png").write_bytes(b"x")
        case "lost":
            layers_file("digits", row, reports).unlink()
        case "weights":
            write_lock(here, DIGITS, digits_maskllm_long_magnitude="other.dir")
        case "exports":
            lock = (here / "dvc.lock").read_text()
            (here / "dvc.lock").write_text(lock.replace("0e0e.dir", "0f0f.dir"))
        case "versions":
            change_record(here, row, lambda record: record["versions"].update(torch="2.0"))
        case "inputs":
            change_record(here, row, lambda record: record["inputs"].update(manifest="other"))
    found = receipt(here)
    assert found.named("differs") == [row]
    assert f"  {row}  metrics equal; not equal: {differing}\n" in said(found)


def test_long_lists_are_cut(here: Path) -> None:
    for row in DIGITS.rows:
        change_metric(here, row, top1=1.0)
    lines = said(receipt(here)).splitlines()
    assert lines[0] == "✘ digits: 25 of 25 rows differ from the committed ones"
    assert "  and 13 more rows" in lines
    for name in ("a.csv", "b.csv", "c|<d>.csv"):
        (here / RESULTS / WANDA / name).write_text("x")
    change_metric(here, top1=83.5)
    found = receipt(here)
    assert found.rows[WANDA].differing == ["a.csv", "b.csv", "c??d?.csv"]
    assert "not equal: a.csv, b.csv and 1 more" in said(found)


def test_rows_that_are_not_made(here: Path) -> None:
    shutil.rmtree(here / RESULTS / WANDA)
    found = receipt(here)
    assert (found.rows[WANDA].verdict, found.rows[WANDA].here) == ("not made", None)
    assert found.rows[WANDA].committed is not None
    assert first_line(found) == "– digits: 1 of 25 rows is not made yet; 24 of 25 rows are equal"
    assert f"  {WANDA}  not made" in said(found)
    shutil.rmtree(here / RESULTS)
    found = receipt(here)
    assert first_line(found) == "– digits: no row is made yet"
    assert said(found).splitlines()[-1] == "next: make repro  make the table"
    assert WANDA not in said(found)


def test_record_of_other_settings_is_not_made_or_says_so(here: Path) -> None:
    raw = DIGITS.model_dump()
    raw["priors"][WANDA]["propagate"] = "pruned"
    changed = Experiment.model_validate(raw)
    assert receipt(here, changed).named("not made") == [WANDA]  # what lies here is of the settings before
    make_records(changed, here / "reports")
    found = receipt(here, changed)
    assert found.named("other settings") == [WANDA]
    assert found.rows[WANDA].differences == []
    assert first_line(found).startswith("– digits: 1 of 25 rows has other settings than the committed one; 24 of")


def test_table_and_rows_that_are_not_committed(here: Path) -> None:
    pets = Experiment.model_validate({**DIGITS.model_dump(), "table": "pets"})
    make_records(pets, here / "reports")
    found = receipt(here, pets)
    assert set(found.named("not committed")) == set(pets.rows)
    assert (found.results, found.agrees) == (None, False)
    assert first_line(found) == "– pets: 25 of 25 rows are made; this table is not committed yet"
    git(here, "rm", "-rq", "--cached", f"{RESULTS}/{WANDA}")
    git(here, "commit", "-qm", "one row less")
    found = receipt(here)
    assert first_line(found) == "– digits: 1 of 25 rows is not committed yet; 24 of 25 rows are equal"


def test_recordings_may_differ(tmp_path: Path) -> None:
    here = make_checkout(tmp_path / "loose", LOOSE)
    assert first_line(receipt(here, LOOSE)).startswith("✔ digits: all 25 rows are equal")
    change_metric(here, top1=83.4)
    line = first_line(receipt(here, LOOSE))
    assert line.startswith(
        "≈ digits: 1 of 25 rows differs from the committed one, as is expected of a recording (exact:"
    )
    assert "compare within error bars" in line


@pytest.mark.parametrize("path", ["record", "lock", "metrics"])
def test_damaged_results_are_named(here: Path, path: str) -> None:
    record = record_file("digits", WANDA, here / "reports")
    if path == "lock":
        (here / "dvc.lock").write_text("stages: [<<<<<<< HEAD")
    elif path == "record":
        record.write_text('{"half":')
    else:
        change_metric(here, top1="many")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="dvc.lock is damaged" if path == "lock" else rf"{WANDA}.*record.json is damaged"
    ):
        receipt(here)


def test_damage_in_the_commit_is_a_difference(here: Path) -> None:
    record = record_file("digits", WANDA, here / "reports")
    whole = record.read_bytes()
    record.write_text("{")
    commit(here)
    record.write_bytes(whole)
    assert receipt(here).rows[WANDA].differing == ["evaluation/record.json: missing in the commit"]
