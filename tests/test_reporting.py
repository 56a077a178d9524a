"""Tables and figures as pure functions of records."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from import_graph import ROOT

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.files import read_json, write_json
from maskllm4v.layout import record_file
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.reporting.comparison import comparison_markdown
from maskllm4v.reporting.published import ROWS
from maskllm4v.reporting.report import table_texts
from maskllm4v.reporting.tables import MISSING, number, results_markdown

REPORTS = ROOT / "reports"


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment(ROOT / "params.yaml")


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    shutil.copytree(REPORTS / "digits" / "runs", tmp_path / "digits" / "runs")
    return tmp_path


def test_mean_spread_and_paired_difference(experiment: Experiment) -> None:
    table = aggregate(experiment, current_records(experiment, REPORTS)).set_index("row")
    values = {
        row: [m["top1"] for m in read_json(record_file("digits", row))["metrics"].values()]
        for row in ("digits-dense", "digits-wanda")
    }
    line = table.loc["digits-wanda"]
    assert line["top1_mean"] == pytest.approx(statistics.mean(values["digits-wanda"]))
    assert line["top1_std"] == pytest.approx(statistics.stdev(values["digits-wanda"]))
    differences = [b - a for a, b in zip(values["digits-dense"], values["digits-wanda"], strict=True)]
    assert line["delta_mean"] == pytest.approx(statistics.mean(differences))
    assert line["delta_std"] == pytest.approx(statistics.stdev(differences))
    assert math.isnan(table.loc["digits-dense", "delta_mean"])


def test_stable_orders_of_the_table(experiment: Experiment) -> None:
    top1 = aggregate(experiment, current_records(experiment, REPORTS)).set_index("row")["top1_mean"]
    for prior in ("sparsegpt", "magnitude"):
        assert top1[f"digits-maskllm-long-{prior}"] > top1[f"digits-maskllm-short-{prior}"]
    for method in ("magnitude", "wanda"):
        assert top1["digits-sparsegpt-update"] > top1[f"digits-{method}"] > top1["digits-sparsegpt-noupdate"]


@pytest.mark.parametrize("damage", ["missing", "other settings"])
def test_row_without_its_record_is_a_dash(experiment: Experiment, reports: Path, damage: str) -> None:
    path = record_file("digits", "digits-wanda", reports)
    if damage == "missing":
        path.unlink()
        changed = experiment
    else:
        raw = experiment.model_dump()
        raw["priors"]["digits-wanda"]["propagate"] = "pruned"
        changed = Experiment.model_validate(raw)
    (line,) = [x for x in table_texts(changed, reports)["table.md"].splitlines() if x.startswith("| Wanda")]
    assert line.count(MISSING) == 6
    assert "digits-wanda" not in table_texts(changed, reports)["metrics.json"]


def test_without_dense_no_difference(experiment: Experiment, reports: Path) -> None:
    record_file("digits", "digits-dense", reports).unlink()
    table = aggregate(experiment, current_records(experiment, reports))
    assert table["delta_mean"].isna().all()
    assert table["top1_mean"].notna().sum() == len(experiment.rows) - 1


def test_empty_reports_render(experiment: Experiment, tmp_path: Path) -> None:
    texts = table_texts(experiment, tmp_path)
    assert "Not measured yet" in texts["table.md"]
    assert len(results_markdown(aggregate(experiment, {})).splitlines()) == 2 + len(experiment.rows)


def test_csv_reads_back(experiment: Experiment) -> None:
    path = REPORTS / "digits" / "table.csv"
    frame = pd.read_csv(path)
    assert list(frame["row"]) == list(experiment.rows)
    assert b"\r" not in path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1.005, 0.1, 1), "1.0 ± 0.1"),
        ((1.25, float("nan"), 2), "1.25"),
        ((float("nan"), 1.0, 2), MISSING),
        ((0.5, 0.25, 2, True), "+0.50 ± 0.25"),
        ((-0.5, 0.25, 2, True), "-0.50 ± 0.25"),
    ],
)
def test_numbers(arguments: tuple[float, float, int], text: str) -> None:
    assert number(*arguments) == text


def test_published_table_is_literal() -> None:
    assert [row.top1 for row in ROWS] == [
        "79.15", "65.92", "63.28", "71.52", "59.72", "76.23", "76.18", "79.46", "79.28",
    ]  # fmt: skip
    for row in ROWS:
        if row.json:
            assert row.json["top1"] + row.json["top1_err"] == pytest.approx(100)
            assert row.json["top5"] + row.json["top5_err"] == pytest.approx(100)
            assert abs(row.json["top1"] - float(row.top1)) < 0.01


def test_reproduced_column_fills_from_records(tmp_path: Path) -> None:
    assert "| 65.92 | 86.058 | – | – |" in comparison_markdown(tmp_path)
    record = read_json(record_file("digits", "digits-magnitude"))
    record["row"] = "imagenet-magnitude"
    record["metrics"] = {"0": {"top1": 66.0, "top5": 86.1, "nll": 1.5}}
    write_json(record_file("imagenet_vit_b16", "imagenet-magnitude", tmp_path), record)
    assert "| 65.92 | 86.058 | 66.00 | 86.10 |" in comparison_markdown(tmp_path)


@pytest.mark.slow
def test_report_writes_the_committed_bytes(tmp_path: Path) -> None:
    """Figures too, under the pin that the stage sets."""
    for name in ("params.yaml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    shutil.copytree(REPORTS / "digits" / "runs", tmp_path / "reports" / "digits" / "runs")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "stages.report"], cwd=tmp_path, check=True, env=environment)
    written = [p for p in (tmp_path / "reports").rglob("*") if p.is_file()]
    assert len(written) > 40
    for path in written:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), path.name
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
