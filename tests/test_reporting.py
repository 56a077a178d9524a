"""Tables and figures as pure functions of records."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from import_graph import ROOT
from made_diffusion import TIMESTEPS, diffusion
from made_diffusion import make_records as make_diffusion_records
from made_records import DIGITS, make_records, metrics, with_controls

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import aggregate, best_row, current_records, timestep_metrics
from maskllm4v.reporting.comparison import comparison_markdown
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.published import ROWS
from maskllm4v.reporting.report import table_texts
from maskllm4v.reporting.tables import MISSING, caption, number, results_markdown
from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import write_record
from maskllm4v.utils.io import read_json

REPORTS = ROOT / "reports"
CLASSIFICATION = metrics_of("classification")
DIFFUSION = diffusion()


@pytest.fixture
def experiment() -> Experiment:
    return DIGITS


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return make_records(DIGITS, tmp_path)


def line_of(experiment: Experiment, reports: Path, label: str) -> list[str]:
    """The cells of one line of the Markdown table."""
    (line,) = [x for x in table_texts(experiment, reports)["table.md"].splitlines() if x.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_mean_spread_and_paired_difference(experiment: Experiment, reports: Path) -> None:
    table = aggregate(experiment, current_records(experiment, reports)).set_index("row")
    values = {
        row: [m["top1"] for m in read_json(record_file("digits", row, reports))["metrics"].values()]
        for row in ("digits-dense", "digits-wanda")
    }
    line = table.loc["digits-wanda"]
    assert line["top1_mean"] == pytest.approx(statistics.mean(values["digits-wanda"]))
    assert line["top1_std"] == pytest.approx(statistics.stdev(values["digits-wanda"]))
    differences = [b - a for a, b in zip(values["digits-dense"], values["digits-wanda"], strict=True)]
    assert line["delta_mean"] == pytest.approx(statistics.mean(differences))
    assert line["delta_std"] == pytest.approx(statistics.stdev(differences))
    assert math.isnan(table.loc["digits-dense", "delta_mean"])
    assert math.isnan(table.loc["digits-dense", "agreement_mean"])
    for name in ("top5", "nll", "ece", "agreement"):
        found = [metrics(experiment, "digits-wanda", seed)[name] for seed in (0, 1, 2)]
        assert line[f"{name}_mean"] == pytest.approx(statistics.mean(found))
        assert line[f"{name}_std"] == pytest.approx(statistics.stdev(found))


def test_best_row(experiment: Experiment, reports: Path) -> None:
    """By the task's own direction, among rows with a pattern; of equals the first; unmeasured rows do not count."""
    table = aggregate(experiment, current_records(experiment, reports))
    assert best_row(experiment, table) == "digits-hybrid-short"  # the metrics' formula says so
    means = table.set_index("row")["top1_mean"].drop("digits-dense")
    table.loc[table["row"].isin(["digits-wanda", "digits-maskllm-detinit"]), "top1_mean"] = means.max() + 1
    table.loc[table["row"] == "digits-dense", "top1_mean"] = 100.0
    assert best_row(experiment, table) == "digits-wanda"
    assert best_row(experiment, table.assign(top1_mean=float("nan"))) is None
    made = aggregate(DIFFUSION, current_records(DIFFUSION, make_diffusion_records(DIFFUSION, reports)))
    assert best_row(DIFFUSION, made) == "tiny-magnitude"  # lower is better


@pytest.mark.parametrize("init", ["scratch", "checkpoint"])
def test_all_seeds_may_be_compared_with_one_dense_model(init: str, tmp_path: Path) -> None:
    raw = DIGITS.model_dump()
    raw["dense"] |= {"shared": True} if init == "scratch" else {"init": init, "checkpoint": "x.safetensors"}
    one = Experiment.model_validate(raw)
    records = current_records(one, make_records(one, tmp_path))
    table = aggregate(one, records).set_index("row")
    assert (table.loc["digits-dense", "seeds"], table.loc["digits-wanda", "seeds"]) == (1, 3)
    dense = metrics(one, "digits-dense", 0)["top1"]
    differences = [metrics(one, "digits-wanda", seed)["top1"] - dense for seed in (0, 1, 2)]
    assert table.loc["digits-wanda", "delta_mean"] == pytest.approx(statistics.mean(differences))
    assert table.loc["digits-wanda", "delta_std"] == pytest.approx(statistics.stdev(differences))
    assert line_of(one, tmp_path, "ViT (dense)")[4:] == ["80.00", MISSING, "99.00", "0.500", "5.0", MISSING, MISSING]
    assert "to the one dense model that all seeds share" in caption(one, CLASSIFICATION, records)
    assert "to the dense model of the same seed" in caption(DIGITS, CLASSIFICATION, records)


def test_controls_are_rows_like_others(tmp_path: Path) -> None:
    controls = with_controls()
    make_records(controls, tmp_path)
    alone, masked = (line_of(controls, tmp_path, f"Trained on: digits-{start}") for start in ("dense", "magnitude"))
    assert alone[1:4] == ["dense", "✔", MISSING]
    assert masked[1:4] == ["2:4", "✔", "Magnitude"]
    assert MISSING not in alone[4:-1] + masked[4:-1]  # costs were not measured


def test_learned_rows_stand_out_and_name_their_prior(experiment: Experiment, reports: Path) -> None:
    (line,) = [x for x in table_texts(experiment, reports)["table.md"].splitlines() if "**Deterministic init (" in x]
    assert line.startswith("| **Deterministic init (200 steps)** | 2:4 | – | Magnitude |")
    assert line_of(experiment, reports, "SparseGPT")[1:4] == ["2:4", "✔", MISSING]


def test_pattern_of_a_prior_is_its_learners(tmp_path: Path) -> None:
    raw = DIGITS.model_dump()
    raw["priors"]["digits-magnitude"]["pattern"] = "1:4"
    other = Experiment.model_validate(raw)
    patterns = aggregate(other, {}).set_index("row")["pattern"]
    assert (patterns["digits-dense"], patterns["digits-wanda"]) == ("dense", "2:4")
    assert {patterns[row] for row, learned in other.learned.items() if learned.prior == "digits-magnitude"} == {"1:4"}


@pytest.mark.parametrize(("split", "leaks"), [("train", False), ("test", True)])
def test_calibration_that_leaks_is_marked(split: str, leaks: bool, tmp_path: Path) -> None:
    raw = DIGITS.model_dump()
    raw["data"]["calibration_split"] = split
    calibrated = Experiment.model_validate(raw)
    make_records(calibrated, tmp_path)
    mark = "**Calibrated on the reported split, which leaks** (as the original does)."
    assert (mark in table_texts(calibrated, tmp_path)["table.md"]) is leaks


def test_caption_names_all_machines(tmp_path: Path) -> None:
    raw = DIGITS.model_dump()
    loose = Experiment.model_validate({**raw, "exact": False})
    records = current_records(loose, make_records(loose, tmp_path))
    records["digits-wanda"]["made"] = {"hardware": "another one", "world_size": 8}
    text = caption(loose, CLASSIFICATION, records)
    assert "Hardware: a machine; another one: a recording of that machine." in text
    assert "Mean ± standard deviation over 3 seeds;" in text
    assert "Hardware: a machine; another one. accelerate" in caption(DIGITS, CLASSIFICATION, records)
    where = caption(DIGITS, CLASSIFICATION, records, reproduced="reproduced on Mars")
    assert "Hardware: a machine; another one: reproduced on Mars. accelerate" in where


def test_stable_orders_of_the_table(experiment: Experiment) -> None:
    top1 = aggregate(experiment, current_records(experiment, REPORTS)).set_index("row")["top1_mean"]
    for prior in ("sparsegpt", "magnitude"):
        assert top1[f"digits-maskllm-long-{prior}"] >= top1[f"digits-maskllm-short-{prior}"] - 1e-4  # or a tie
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
    # no weight update, no prior, and none of seven numbers
    assert line_of(changed, reports, "Wanda") == ["Wanda", "2:4", *[MISSING] * 9]
    assert "wanda" not in table_texts(changed, reports)["metrics.json"]


def test_without_dense_no_difference(experiment: Experiment, reports: Path) -> None:
    record_file("digits", "digits-dense", reports).unlink()
    table = aggregate(experiment, current_records(experiment, reports))
    assert table["delta_mean"].isna().all()
    assert table["top1_mean"].notna().sum() == len(experiment.rows) - 1


def test_empty_reports_render(experiment: Experiment, tmp_path: Path) -> None:
    texts = table_texts(experiment, tmp_path)
    assert "Not measured yet" in texts["table.md"]
    assert len(results_markdown(aggregate(experiment, {}), CLASSIFICATION).splitlines()) == 2 + len(experiment.rows)
    assert texts["metrics.json"] == '{\n  "top1": {}\n}\n'


def test_metrics_for_dvc_are_means_by_row(experiment: Experiment, reports: Path) -> None:
    record_file("digits", "digits-wanda", reports).unlink()
    found = json.loads(table_texts(experiment, reports)["metrics.json"])
    wanted = {
        row.removeprefix("digits-"): statistics.mean(metrics(experiment, row, seed)["top1"] for seed in (0, 1, 2))
        for row in experiment.rows
    }
    del wanted["wanda"]
    assert list(found) == ["top1"]
    assert found["top1"] == pytest.approx(wanted, abs=1e-4)


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
    make_records(DIGITS, tmp_path / "digits", ["digits-magnitude"])
    record = read_json(record_file("digits", "digits-magnitude", tmp_path / "digits"))
    record |= {"row": "imagenet-magnitude", "seeds": [0]}
    record["metrics"] = {"0": {"top1": 66.0, "top5": 86.1, "nll": 1.5}}
    write_record(record_file("imagenet_vit_b16", "imagenet-magnitude", tmp_path), record)
    assert "| 65.92 | 86.058 | 66.00 | 86.10 |" in comparison_markdown(tmp_path)


# Diffusion


def test_errors_of_diffusion_are_compared_with_the_dense_model_s(tmp_path: Path) -> None:
    make_diffusion_records(DIFFUSION, tmp_path)
    wanted = ["Magnitude", "2:4", MISSING, MISSING, "0.0610 ± 0.0014", "+0.0100 ± 0.0000"]
    wanted += ["0.0032 ± 0.0003", "87.5 ± 0.7", "3.62 ± 0.18", "0.0246 ± 0.0000", MISSING]
    assert line_of(DIFFUSION, tmp_path, "Magnitude") == wanted
    assert line_of(DIFFUSION, tmp_path, "DiT (dense)")[5:7] == [MISSING, MISSING]
    header = table_texts(DIFFUSION, tmp_path)["table.md"].splitlines()[0]
    assert "| ε-MSE | Δ to dense | MSE to dense | Conditional accuracy (%) | FD (our classifier) |" in header
    table = aggregate(DIFFUSION, current_records(DIFFUSION, tmp_path))
    assert not [column for column in table.columns if "/t" in column]


def test_caption_of_diffusion_says_what_its_metrics_are(tmp_path: Path) -> None:
    make_diffusion_records(DIFFUSION, tmp_path)
    text = table_texts(DIFFUSION, tmp_path)["table.md"]
    assert "Δ is the paired difference of ε-MSE to the dense model of the same seed; ε-MSE: " in text
    assert "FD: Fréchet distance in that classifier's features, not FID" in text
    assert "top-1" not in text
    assert "diffusers " in text


def test_caption_says_what_the_judge_gets_right_of_real_images(tmp_path: Path) -> None:
    """The first seed's: all seeds have one judge."""
    judged = current_records(DIFFUSION, make_diffusion_records(DIFFUSION, tmp_path / "judged"))
    assert "; it gets 96.4 % of the real images right." in caption(DIFFUSION, metrics_of("diffusion"), judged)
    del judged["tiny-dense"]
    alone = current_records(DIFFUSION, make_diffusion_records(DIFFUSION, tmp_path / "alone", judged=False))
    for records in (judged, alone):
        assert "real images" not in caption(DIFFUSION, metrics_of("diffusion"), records)


@pytest.mark.parametrize("judged", [True, False])
def test_metrics_of_diffusion_for_dvc(judged: bool, tmp_path: Path) -> None:
    make_diffusion_records(DIFFUSION, tmp_path, judged=judged)
    texts = table_texts(DIFFUSION, tmp_path)
    found = json.loads(texts["metrics.json"])
    assert list(found) == ["eps_mse"]
    assert found["eps_mse"]["wanda"] == 0.071
    assert "tiny-wanda,Wanda,oneshot,2:4,False,,2,0.071000,0.001414," in texts["table.csv"]
    if not judged:
        assert line_of(DIFFUSION, tmp_path, "Wanda")[7:] == [MISSING] * 4


def test_settings_of_the_evaluation_belong_to_a_record(tmp_path: Path) -> None:
    make_diffusion_records(DIFFUSION, tmp_path)
    assert len(current_records(DIFFUSION, tmp_path)) == len(DIFFUSION.rows)
    assert current_records(diffusion(evaluation={"timesteps": 3}), tmp_path) == {}


def test_metrics_by_timestep_are_means_over_seeds(tmp_path: Path) -> None:
    make_diffusion_records(DIFFUSION, tmp_path)
    records = current_records(DIFFUSION, tmp_path)
    found = timestep_metrics(records["tiny-magnitude"])
    assert list(found) == ["dense_mse", "eps_mse"]
    assert found["eps_mse"] == pytest.approx({t: 0.061 * 40 / t for t in TIMESTEPS}, abs=2e-6)
    assert list(timestep_metrics(records["tiny-dense"])) == ["eps_mse"]


@pytest.mark.slow
def test_report_writes_the_committed_bytes(tmp_path: Path) -> None:
    """Figures too, under the pin that the stage sets."""
    for name in ("params.yaml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for runs in [*REPORTS.glob("*/runs"), REPORTS / "benchmarks", REPORTS / "receipts"]:  # the README shows all tables
        shutil.copytree(runs, tmp_path / runs.relative_to(ROOT))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for stage in ("report", "documents"):
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=tmp_path, check=True, env=environment)
    written = [p for p in (tmp_path / "reports").rglob("*") if p.is_file()]
    assert len(written) > 40
    for path in written:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), path.name
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
