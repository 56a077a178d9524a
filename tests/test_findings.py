"""docs/findings.md says what records say: its tables are generated, and each number in its text is its record's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from import_graph import ROOT
from made_records import DIGITS, make_records, metrics

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import seed_metrics
from maskllm4v.reporting.benchmarks.costs import trained_length, whole_costs
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.paired import MARKER, paired_markdown, paired_sections
from maskllm4v.reporting.report import experiments
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import read_json

FINDINGS = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
GENERATED = re.compile(r"<!-- ([\w-]+: [\w-]+) -->.*?<!-- /\1 -->", re.DOTALL)
LONG = "digits-maskllm-long-magnitude"
NUMBER = re.compile(r"\[(\d+\.\d+)\]\(\.\./(reports/([\w-]+)/runs/[\w-]+/evaluation/record\.json)\)")


def test_each_number_with_a_record_is_the_records() -> None:
    tables = experiments(ROOT)
    found = NUMBER.findall(GENERATED.sub("", FINDINGS))
    assert len(found) > 10
    for number, path, table in found:
        headline = metrics_of(tables[table].task.name).headline.name
        mean = seed_metrics(read_json(ROOT / path))[headline].mean()
        assert f"{mean:.{len(number.partition('.')[2])}f}" == number, path


def test_memory_and_time_of_gates_are_the_benchmarks() -> None:
    lines = {cells[1].strip(): cells[2:4] for line in FINDINGS.splitlines() if len(cells := line.split("|")) == 5}
    for row in read_json(ROOT / "reports/benchmarks/gates.json")["sections"]["gates"]:
        cell = lines[row["pattern"]][row["gate"] == "positions"]
        assert cell.strip() == f"{row['mb']:.0f} MB, {row['ms']:.0f} ms"


def test_no_number_stands_without_a_source() -> None:
    """Percentages are links to records; what else has a decimal point is a setting, or stands in a generated table."""
    text = re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`", "", GENERATED.sub("", FINDINGS))
    assert re.findall(r"\d+\.\d+ ?%?", text) == []


def test_linked_files_exist() -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", FINDINGS) if "://" not in link]
    assert links
    assert [link for link in links if link and not (ROOT / "docs" / link).exists()] == []


def test_tables_compare_patterns_with_the_long_learned_row() -> None:
    tables = experiments(ROOT)
    found = {
        (table, tables[table].row(row).pattern, tables[table].row(row).kind) for table, row in MARKER.findall(FINDINGS)
    }
    wanted = {("digits", "2:4"), ("cifar10", "2:4"), ("cifar10", "1:4"), ("digits_patterns", "1:4")}
    assert {(*one, "learned") for one in wanted} <= found


def lines_of(markdown: str) -> dict[str, list[str]]:
    """Cells by record."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines()[2:]]
    return {re.findall(r"runs/([\w-]+)/", cells[0])[0]: cells for cells in rows}


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    rows = [row for row in DIGITS.rows if row != "digits-wanda"]
    reports = make_records(DIGITS, tmp_path / "reports", rows)
    lines = lines_of(paired_markdown(DIGITS, LONG, reports, tmp_path / "docs"))
    assert list(lines) == rows[1:]  # not the dense one, nor what was not measured
    for row, (name, update, *_, delta, _, _) in lines.items():
        found = [metrics(DIGITS, row, seed)["top1"] - metrics(DIGITS, LONG, seed)["top1"] for seed in DIGITS.seeds]
        mean = sum(found) / 3
        spread = (sum((one - mean) ** 2 for one in found) / 2) ** 0.5
        assert delta == ("0" if row == LONG else f"{mean:+.2f} ± {spread:.2f}")
        assert f"../reports/digits/runs/{row}/evaluation/record.json" in name
        assert (update == "✔") == DIGITS.row(row).updates_weights


def test_steps_and_costs_are_those_of_the_whole_way() -> None:
    updated = "digits-maskllm-long-ls"
    assert [row.key for row in DIGITS.row(updated).chain] == [updated, LONG, "digits-magnitude"]
    assert [row.key for row in DIGITS.row("digits-dense").chain] == ["digits-dense"]
    lengths = [trained_length(DIGITS, row, "steps") for row in ("digits-magnitude", LONG, updated)]
    assert lengths == [0.0, 800.0, 800.0]
    costs = {updated: 1.0, LONG: 20.0, "digits-magnitude": 300.0}
    assert whole_costs(DIGITS, costs) == {updated: 321.0, LONG: 320.0, "digits-magnitude": 300.0}
    assert whole_costs(DIGITS, {updated: 1.0, "digits-magnitude": 300.0}) == {"digits-magnitude": 300.0}


def test_nothing_measured(tmp_path: Path) -> None:
    assert paired_markdown(DIGITS, LONG, tmp_path, tmp_path) == "Not measured yet.\n"


@pytest.mark.parametrize("marker", ["digits: nothing", "nothing: digits-dense"])
def test_markers_that_name_nothing(marker: str, tmp_path: Path) -> None:
    tables: dict[str, Experiment] = {"digits": DIGITS}
    with pytest.raises(UserError, match=f"<!-- {marker} -->: there is no such row"):
        paired_sections(f"<!-- {marker} --><!-- /{marker} -->", tables, tmp_path, tmp_path)
