"""What ``dvc.yaml`` offers beside stages: plots of the committed curves, and the best masks by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_graph import ROOT

from maskllm4v.reporting.aggregate import aggregate, best_row, current_records
from maskllm4v.reporting.names import short_names
from maskllm4v.reporting.report import experiments

REPORTS = ROOT / "reports"
FILE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
EXPERIMENTS = experiments(ROOT)
BEST = {table: best_row(e, aggregate(e, current_records(e, REPORTS))) for table, e in EXPERIMENTS.items()}
ENTRIES = {table: f"{table.replace('_', '-')}-masks" for table, best in BEST.items() if best is not None}


def test_every_measured_table_has_an_entry() -> None:
    assert sorted(FILE["artifacts"]) == sorted(ENTRIES.values())


@pytest.mark.parametrize("table", ENTRIES)
def test_entry_names_the_best_row(table: str) -> None:
    entry, experiment, best = FILE["artifacts"][ENTRIES[table]], EXPERIMENTS[table], BEST[table]
    assert best is not None
    assert entry["path"] == f"artifacts/{best}"
    assert entry["type"] == "model"
    assert {experiment.row(best).pattern, "masks", experiment.task.name} <= set(entry["labels"])
    assert f"table {table}, {experiment.row(best).pattern} " in entry["desc"]
    assert ("weights" in entry["labels"]) is experiment.row(best).updates_weights


# Plots

PLOTS = ["loss", "max-probability", "off-prior", "flipped", "tau"]


def test_make_draws_the_plots_that_compare_rows() -> None:
    assert [name for plot in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for name in plot] == PLOTS
    assert f"dvc plots show {' '.join(PLOTS)}\n" in (ROOT / "Makefile").read_text()


def dvc(folder: Path, *arguments: str) -> Any:
    command = [sys.executable, "-m", "dvc", "plots", *arguments, "--json"]
    found = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)
    assert not found.get("errors")
    return found["data"]


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DVC reads for plots, committed; then one row learns less long."""
    folder = tmp_path_factory.mktemp("plots")
    for path in (".dvc/config", ".dvc/plots/rows.json", "dvc.yaml", "params.yaml", "reports/digits/curves.csv"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "curves")
    curves = folder / "reports/digits/curves.csv"
    lines = curves.read_text().splitlines(keepends=True)
    curves.write_text("".join(line for line in lines if not re.match(r"(?:[5-9]\d|1\d\d),maskllm-detinit,", line)))
    return folder


@pytest.mark.slow
def test_plots_show_each_row_against_steps(project: Path) -> None:
    found = dvc(project, "show", *PLOTS)
    assert list(found) == PLOTS
    names, digits = short_names(EXPERIMENTS["digits"].rows), EXPERIMENTS["digits"]
    for (plot,) in found.values():
        content = plot["content"]
        axes = content["encoding"]
        values = content["data"]["values"]
        assert {value["row"] for value in values} == {names[row] for row in digits.learned}
        assert all(float(value[axes[axis]["field"]]) >= 0 for value in values for axis in "xy")
        assert axes["x"]["title"] == "step"
        assert axes["color"]["field"] == "row"
        assert "<DVC" not in json.dumps(content)
    for part in (lambda content: content["title"]["text"], lambda content: content["encoding"]["y"]["title"]):
        assert len({part(plot["content"]) for (plot,) in found.values()}) == len(found)


@pytest.mark.slow
def test_plots_tell_revisions_apart(project: Path) -> None:
    (plot,) = dvc(project, "diff", "HEAD", "--targets", "tau")["tau"]
    content = plot["content"]
    assert content["encoding"]["strokeDash"]["field"] == "rev"
    lengths = {
        revision: sum(v["rev"] == revision and v["row"] == "maskllm-detinit" for v in content["data"]["values"])
        for revision in ("HEAD", "workspace")
    }
    assert lengths == {"HEAD": 21, "workspace": 5}
