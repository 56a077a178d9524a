"""What README and captions say of where tables were reproduced: what the receipts say, and no more."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT
from made_records import DIGITS, make_records
from receipt_project import EPYC, WANDA, change_metric, commit, run_stages

from maskllm4v.config import Experiment
from maskllm4v.receipts import CPU, Receipt, Row, build_receipt, write_receipt
from maskllm4v.reporting.aggregate import current_records
from maskllm4v.reporting.receipts import claim, receipts_markdown, reproduced_markdown
from maskllm4v.reporting.report import check_report, page_text, table_texts, write_report
from maskllm4v.utils.errors import UserError

XEON = CPU(name="Intel(R) Xeon(R) Processor", architecture="x86_64", vendor="GenuineIntel", family=6, model=207)
HASWELL = CPU(name="Haswell", architecture="x86_64", family=6, model=60, avx2=True)
PETS = DIGITS.model_copy(update={"table": "pets"})
LOOSE = DIGITS.model_copy(update={"table": "loose", "exact": False})
KNOWN = {"digits": DIGITS, "pets": PETS, "loose": LOOSE}
EPYC_NAME, XEON_NAME = "AMD EPYC (family 25, model 17)", "Intel(R) Xeon(R) Processor (family 6, model 207)"
HASWELL_NAME = "Haswell (family 6, model 60), emulated by QEMU 7.2"


@pytest.fixture
def here(checkout: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkout, tmp_path / "checkout")


def keep(here: Path, name: str, experiment: Experiment = DIGITS, **known: Any) -> Receipt:
    found = build_receipt(here, experiment, **{"cpu": EPYC, **known})
    write_receipt(here / "reports" / "receipts" / f"{name}.json", found)
    return found


def emulated(here: Path, name: str, *digests: str, cpu: CPU = HASWELL) -> Receipt:
    rows = {f"train@{number}": Row.compared("a" * 64, digest * 64) for number, digest in enumerate(digests)}
    return keep(here, name, cpu=cpu, emulator="QEMU 7.2", chain="shortened", rows=rows)


def cells(here: Path) -> list[list[str]]:
    """The lines of the README's table, without its rule."""
    text = receipts_markdown(KNOWN, here / "reports")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in [lines[0], *lines[2:]]]


def note(here: Path) -> str:
    return receipts_markdown(KNOWN, here / "reports").splitlines()[-1]


def caption(here: Path, experiment: Experiment = DIGITS) -> str:
    return table_texts(experiment, here / "reports")["table.md"].splitlines()[-1]


def test_without_receipts_nothing_is_claimed(here: Path) -> None:
    reports = here / "reports"
    assert receipts_markdown(KNOWN, reports) == "No receipts yet: nobody has said where the tables were reproduced.\n"
    assert reproduced_markdown(KNOWN, reports) == "[Where that was tried](#how-exact-is-exact).\n"
    assert claim(DIGITS, reports) == ""
    assert "Hardware: a machine. accelerate" in caption(here)


def test_a_machine_that_reproduced_everything(here: Path) -> None:
    keep(here, "a")
    assert cells(here) == [
        ["CPU", "What ran", "Compared with", "digits", "pets"],
        [EPYC_NAME, "every stage", "today's results", "25 of 25", "–"],
    ]
    assert "differ" not in note(here)
    assert claim(DIGITS, here / "reports") == f"reproduced to the last bit on {EPYC_NAME}"
    assert claim(PETS, here / "reports") == ""
    assert f"Hardware: a machine: reproduced to the last bit on {EPYC_NAME}. accelerate" in caption(here)
    assert f"reproduced to the last bit on {EPYC_NAME}" in page_text(DIGITS, here / "reports", {})
    head = reproduced_markdown(KNOWN, here / "reports")
    assert head.startswith(f"So far that was reproduced, to the last bit: `digits` on {EPYC_NAME}. [Where")


def test_several_machines_and_tables(here: Path) -> None:
    make_records(PETS, here / "reports")
    commit(here)
    keep(here, "a")
    keep(here, "b", PETS)
    keep(here, "c", cpu=XEON)
    emulated(here, "d", "a", "a")
    assert cells(here)[1:] == [
        [EPYC_NAME, "every stage", "today's results", "25 of 25", "25 of 25"],
        [XEON_NAME, "every stage", "today's results", "25 of 25", "–"],
        [HASWELL_NAME, "a few steps", "today's results", "2 of 2", "–"],
    ]
    assert claim(DIGITS, here / "reports") == (
        f"reproduced to the last bit on {EPYC_NAME} and {XEON_NAME}; shortened to a few steps, also on {HASWELL_NAME}"
    )
    head = reproduced_markdown(KNOWN, here / "reports")
    assert f"`digits` and `pets` on {EPYC_NAME}; `digits` on {XEON_NAME}. [Where" in head
    assert "Haswell" not in head  # a few steps are not the table


def test_emulated_machines_alone(here: Path) -> None:
    emulated(here, "a", "a", "a")
    emulated(here, "b", "a", "b", cpu=HASWELL.model_copy(update={"name": "Zen"}))
    assert claim(DIGITS, here / "reports") == f"reproduced to the last bit, shortened to a few steps, on {HASWELL_NAME}"
    assert [line[3] for line in cells(here)[1:]] == ["2 of 2", "1 of 2"]
    assert reproduced_markdown(KNOWN, here / "reports") == "[Where that was tried](#how-exact-is-exact).\n"


def test_rows_that_differ_are_named_and_claim_nothing(here: Path, checkout: Path) -> None:
    change_metric(here, top1=83.412)
    change_metric(here, "digits-ria", nll=0.4001)
    found = build_receipt(here, DIGITS, cpu=EPYC)
    shutil.rmtree(here / "reports")
    shutil.copytree(checkout / "reports", here / "reports")
    write_receipt(here / "reports/receipts/a.json", found)
    assert cells(here)[1:] == [[EPYC_NAME, "every stage", "today's results", "23 of 25", "–"]]
    sentence = f"{EPYC_NAME}, digits, today's results: `ria` and `wanda` came out different, from the 2nd digit on."
    assert note(here).endswith(f" {sentence}*")
    assert claim(DIGITS, here / "reports") == ""


def test_results_that_were_replaced_make_history(here: Path) -> None:
    """Receipts of results before stay in the table, marked, and claim nothing; today's come first."""
    keep(here, "a", cpu=XEON)
    old = build_receipt(here, DIGITS, cpu=EPYC)
    change_metric(here, top1=83.412)
    failed = build_receipt(here, DIGITS, cpu=EPYC)  # against the commit before
    write_receipt(here / "reports/receipts/b.json", failed)
    commit(here)
    keep(here, "z", cpu=XEON)
    before = f"older results ({(old.commit or '')[:7]})"
    assert cells(here)[1:] == [
        [XEON_NAME, "every stage", "today's results", "25 of 25", "–"],
        [XEON_NAME, "every stage", before, "25 of 25", "–"],
        [EPYC_NAME, "every stage", before, "24 of 25", "–"],
    ]
    assert f"{EPYC_NAME}, digits, {before}: `wanda` came out different, from the 3rd digit on." in note(here)
    assert claim(DIGITS, here / "reports") == f"reproduced to the last bit on {XEON_NAME}"


def test_rows_that_were_not_measured_are_no_claim(here: Path) -> None:
    shutil.rmtree(here / ".cache")
    run_stages(here, DIGITS, "evaluate")
    keep(here, "a")
    assert cells(here)[1:] == [[EPYC_NAME, "all but evaluations of equal weights", "today's results", "25 of 25", "–"]]
    assert claim(DIGITS, here / "reports") == ""


def test_recordings_and_tables_of_others_are_passed_over(here: Path) -> None:
    found = keep(here, "a")
    for table in ("loose", "unknown"):
        write_receipt(here / f"reports/receipts/{table}.json", found.model_copy(update={"table": table}))
    assert len(cells(here)) == 2
    make_records(LOOSE, here / "reports")
    assert "Hardware: a machine: a recording of that machine. accelerate" in caption(here, LOOSE)


def test_rendering_does_not_change_what_is_rendered(here: Path) -> None:
    """Receipts are of results, not of what is made from them: a second time gives the same."""
    sections = ("digits", "receipts", "reproduced")
    (here / "README.md").write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in sections))
    keep(here, "a")
    write_report(here)
    first = {path: path.read_bytes() for path in [here / "README.md", here / "reports/digits/table.md"]}
    assert first[here / "README.md"].decode().count(EPYC_NAME) == 3
    write_report(here)
    assert {path: path.read_bytes() for path in first} == first
    check_report(here)
    assert build_receipt(here, DIGITS, cpu=EPYC).agrees
    keep(here, "b", cpu=XEON)
    with pytest.raises(UserError, match=r"README\.md"):
        check_report(here)


def test_damaged_receipts_are_named(here: Path) -> None:
    keep(here, "a")
    (here / "reports/receipts/theirs.json").write_text("{")
    with pytest.raises(UserError, match=r"receipts/theirs\.json is not a receipt"):
        receipts_markdown(KNOWN, here / "reports")


# The project's own


def test_claims_name_their_evidence() -> None:
    """No text of the project says that all CPUs give the same bits."""
    kinds = ("*.py", "*.yaml", "*.md", "*.toml", "*.html", "*.sh", "Makefile")
    files = [path for kind in kinds for path in ROOT.glob(kind)]
    for folder in ("maskllm4v", "stages", "scripts", "tests", "experiments", "docs", "benchmarks"):
        files += [path for kind in kinds for path in (ROOT / folder).rglob(kind)]
    assert len(files) > 200
    wrong = re.compile(r"\b(any|every|all) x86-64", re.IGNORECASE)
    generated = re.compile(r"<!-- (\w+) -->.*?<!-- /\1 -->", re.DOTALL)  # says what records say
    found = {path.name for path in files if wrong.search(generated.sub("", path.read_text(encoding="utf-8")))}
    assert found == set()


def test_every_receipt_that_is_kept_can_be_read() -> None:
    folder = ROOT / "reports" / "receipts"
    assert (folder / "README.md").exists()  # git keeps no empty folder, and DVC depends on it
    assert receipts_markdown({}, ROOT / "reports")


def test_records_of_recordings_are_shown_as_measured() -> None:
    raw = (ROOT / "reports/cifar10/table.md").read_text()
    assert re.search(r"Hardware: Intel[^:.]*: a recording of that machine\. ", raw)
    assert WANDA in current_records(DIGITS, ROOT / "reports")
