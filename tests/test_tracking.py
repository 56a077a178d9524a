"""Records in MLflow: one run a row, whatever happened before."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT
from made_diffusion import TIMESTEPS, diffusion, picture
from made_diffusion import make_records as make_diffusion_records
from made_records import DIGITS, make_records, with_controls

from maskllm4v.config import Experiment
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import write_record
from maskllm4v.tracking.publishing import publish
from maskllm4v.tracking.runs import LARGEST_ARTIFACT, flatten
from maskllm4v.tracking.views import TAG, saved_view
from maskllm4v.utils.images import read_picture
from maskllm4v.utils.io import read_json, value_digest

ROWS = ("digits-dense", "digits-magnitude", "digits-maskllm-short-magnitude")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of three rows, without the tensors behind them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_records(DIGITS, tmp_path / "reports", ROWS)
    return tmp_path


@pytest.fixture
def experiment() -> Experiment:
    return DIGITS


@pytest.fixture(autouse=True)
def their_warnings() -> Iterator[None]:
    """MLflow and its database layers warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def client_of(root: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path, table: str = "digits") -> list[Any]:
    found = client_of(root).get_experiment_by_name(table)
    return client_of(root).search_runs([found.experiment_id], max_results=1000)


def by_row(root: Path, table: str = "digits") -> dict[str, Any]:
    return {run.data.tags["row"]: run for run in runs(root, table)}


def test_one_run_a_row_however_often(root: Path, experiment: Experiment) -> None:
    published = publish(root, experiment)
    assert sorted(published) == sorted(ROWS)
    first = {run.info.run_id for run in runs(root)}
    assert publish(root, experiment) == published
    assert {run.info.run_id for run in runs(root)} == first
    assert len(first) == 3


def test_table_has_its_view(root: Path, experiment: Experiment) -> None:
    publish(root, experiment)
    client = client_of(root)
    found = client.get_experiment_by_name("digits")
    assert found.tags[TAG] == saved_view(metrics_of("classification"))
    client.set_experiment_tag(found.experiment_id, TAG, "of an earlier release")
    publish(root, experiment)
    assert client.get_experiment_by_name("digits").tags == found.tags


def test_run_says_what_the_record_says(root: Path, experiment: Experiment) -> None:
    publish(root, experiment)
    run = by_row(root)["digits-maskllm-short-magnitude"]
    record = read_json(record_file("digits", run.data.tags["row"], root / "reports"))
    accuracies = [metrics["top1"] for metrics in record["metrics"].values()]
    assert run.data.metrics["top1"] == pytest.approx(sum(accuracies) / 3)
    assert run.data.metrics["top1/seed2"] == accuracies[2]
    assert run.data.params["learning.steps"] == "200"
    assert run.data.params["prior.method"] == "magnitude"
    assert run.data.tags["method"] == "maskllm"
    assert run.data.tags["prior"] == "digits-magnitude"
    assert run.data.tags["current"] == "true"
    assert (run.data.tags["hardware"], run.data.tags["world_size"]) == ("a machine", "1")
    assert {"ece", "agreement", "agreement/std", "ece/seed0", "top1/delta"} <= set(run.data.metrics)
    assert run.info.status == "FINISHED"
    (data,) = run.inputs.dataset_inputs
    assert record["inputs"]["manifest"].startswith(data.dataset.digest)


def test_curves_and_artifacts(root: Path, experiment: Experiment) -> None:
    from mlflow.tracking import MlflowClient

    (root / "artifacts/digits-magnitude").mkdir(parents=True)
    (root / "artifacts/digits-magnitude/seed0.safetensors").write_bytes(b"masks")
    files = root / "artifacts/exports/digits-magnitude"
    files.mkdir(parents=True)
    for name, size in (("packed.safetensors", 10), ("model.onnx", 10), ("large.onnx", LARGEST_ARTIFACT + 1)):
        (files / name).write_bytes(bytes(size))
    (root / "reports/digits/exports.md").write_text("files")
    (root / "reports/digits/figures").mkdir()
    for name in ("curves.svg", "samples.png"):
        (root / "reports/digits/figures" / name).write_bytes(b"drawn")
    publish(root, experiment)
    client, found = MlflowClient(f"sqlite:///{root / 'mlflow.db'}"), by_row(root)
    learned = found["digits-maskllm-short-magnitude"].info.run_id
    history = client.get_metric_history(learned, "train/loss")
    assert [point.step for point in history] == [*range(0, 200, 10), 199]
    assert [point.timestamp for point in history] == [point.step for point in history]
    assert {file.path for file in client.list_artifacts(learned)} >= {"evaluation", "curves"}
    evaluated = {file.path for file in client.list_artifacts(learned, "evaluation")}
    assert evaluated == {"evaluation/record.json", "evaluation/layers.csv"}
    assert {file.path for file in client.list_artifacts(learned, "curves")} == {f"curves/seed{k}.csv" for k in range(3)}
    pruned = found["digits-magnitude"].info.run_id
    assert [file.path for file in client.list_artifacts(pruned, "masks")] == ["masks/seed0.safetensors"]
    exported = [file.path for file in client.list_artifacts(pruned, "export")]
    assert exported == [f"export/{name}" for name in ("large.onnx", "model.onnx", "packed.safetensors")]
    reported = {file.path for file in client.list_artifacts(pruned, "report")}
    assert reported >= {f"report/{name}" for name in ("exports.md", "curves.svg", "samples.png")}
    assert client.list_artifacts(learned, "export") == []


def test_controls_name_what_they_start_from(root: Path) -> None:
    controls = with_controls()
    rows = ("digits-dense-more", "digits-magnitude-more")
    make_records(controls, root / "reports", rows)
    publish(root, controls)
    found = by_row(root)
    assert len(found) == 5
    tags = [[found[row].data.tags.get(key) for key in ("stage", "method", "prior", "pattern")] for row in rows]
    assert tags == [
        ["finetune", "finetune", "digits-dense", "dense"],
        ["finetune", "finetune", "digits-magnitude", "2:4"],
    ]
    assert found[rows[0]].data.params["finetuning.steps"] == "200"
    assert {"train/loss", "train/lr", "train/grad_norm", "top1/delta"} <= set(found[rows[0]].data.metrics)


def test_deleted_store_is_rebuilt(root: Path, experiment: Experiment) -> None:
    publish(root, experiment)
    before = {run.info.run_id for run in runs(root)}
    (root / "mlflow.db").unlink()
    # In a process of its own: MLflow keeps files open, and would read the deleted one.
    again = (
        "import pathlib, sys, made_records; from maskllm4v.tracking.publishing import publish; "
        "publish(pathlib.Path(sys.argv[1]), made_records.DIGITS)"
    )
    subprocess.run(
        [sys.executable, "-c", again, str(root)],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    with sqlite3.connect(root / "mlflow.db") as store:
        after = {run_id for (run_id,) in store.execute("SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'")}
    assert len(after) == 3
    assert not after & before


def test_run_cut_short_is_replaced(root: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("maskllm4v.tracking.publishing.row_files", fail)
        with pytest.raises(KeyboardInterrupt):
            publish(root, experiment)
    assert len(runs(root)) == 1
    publish(root, experiment)
    assert len(runs(root)) == 3
    assert all(run.data.tags["current"] == "true" for run in runs(root))


def variant_of(experiment: Experiment, row: str, root: Path, lr: float) -> Experiment:
    """The experiment with another learning rate for one row, and a record of it."""
    raw = experiment.model_dump()
    raw["learned"] = {key: dict(value) for key, value in raw["learned"].items()}
    raw["learned"][row]["lr"] = lr
    changed = Experiment.model_validate(raw)
    path = record_file(experiment.table, row, root / "reports")
    settings = changed.row(row).record_settings()
    write_record(path, {**read_json(path), "settings": settings, "settings_digest": value_digest(settings)})
    return changed


def test_variants_stand_beside_and_current_moves(root: Path, experiment: Experiment) -> None:
    row = "digits-maskllm-short-magnitude"
    original = record_file("digits", row, root / "reports").read_bytes()
    publish(root, experiment)
    publish(root, variant_of(experiment, row, root, 0.02))
    found = {
        run.data.params["learning.lr"]: run.data.tags["current"] for run in runs(root) if run.data.tags["row"] == row
    }
    assert found == {"0.01": "false", "0.02": "true"}
    record_file("digits", row, root / "reports").write_bytes(original)
    publish(root, experiment)
    found = {
        run.data.params["learning.lr"]: run.data.tags["current"] for run in runs(root) if run.data.tags["row"] == row
    }
    assert found == {"0.01": "true", "0.02": "false"}


def test_new_result_of_the_same_settings_replaces_the_old(root: Path, experiment: Experiment) -> None:
    publish(root, experiment)
    path = record_file("digits", "digits-magnitude", root / "reports")
    record = read_json(path)
    record["metrics"]["0"]["top1"] = 1.0
    write_record(path, record)
    publish(root, experiment)
    assert len(runs(root)) == 3
    assert by_row(root)["digits-magnitude"].data.metrics["top1/seed0"] == 1.0


def test_stale_record_is_not_published(root: Path, experiment: Experiment) -> None:
    variant_of(experiment, "digits-maskllm-short-magnitude", root, 0.5)
    assert sorted(publish(root, experiment)) == ["digits-dense", "digits-magnitude"]


def test_tracking_uri_is_honoured(root: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'elsewhere.db'}")
    monkeypatch.chdir(root)
    publish(root, experiment)
    assert (root / "elsewhere.db").exists()
    assert not (root / "mlflow.db").exists()


def test_runs_of_diffusion(root: Path) -> None:
    from mlflow.tracking import MlflowClient

    tiny = diffusion()
    make_diffusion_records(tiny, root / "reports")
    judged = record_file("tiny", "tiny-dense", root / "reports")
    record = read_json(judged)
    for seed, value in (("0", 97.5), ("1", 96.5)):
        record["metrics"][seed]["judge_accuracy"] = value  # no column of the table
    write_record(judged, record)
    publish(root, tiny)
    found = by_row(root, "tiny")
    assert set(found) == set(tiny.rows)
    dense, pruned = found["tiny-dense"].data, found["tiny-magnitude"].data
    assert pruned.metrics["eps_mse"] == pytest.approx(0.061)
    assert pruned.metrics["eps_mse/delta"] == pytest.approx(0.01)
    assert {"eps_mse/seed1", "dense_mse", "accuracy", "fd", "kd/std"} <= set(pruned.metrics)
    assert not {"dense_mse", "eps_mse/delta", "timesteps/dense_mse"} & set(dense.metrics)
    assert not [name for name in pruned.metrics if "top1" in name or "/t0" in name]
    assert (dense.metrics["judge_accuracy"], dense.metrics["judge_accuracy/seed0"]) == (97.0, 97.5)
    assert pruned.tags["task"] == "diffusion"
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    history = client.get_metric_history(found["tiny-magnitude"].info.run_id, "timesteps/eps_mse")
    assert [point.step for point in history] == list(TIMESTEPS)
    assert [point.value for point in history] == pytest.approx([0.061 * 40 / t for t in TIMESTEPS], abs=2e-6)


def test_pictures_are_images_of_the_run(root: Path, tmp_path: Path) -> None:
    """Under one key and step, where the UI's grid finds them; publishing again adds none."""
    from mlflow.tracking import MlflowClient

    tiny = diffusion()
    make_diffusion_records(tiny, root / "reports")
    published = publish(root, tiny)
    client, run_id = MlflowClient(f"sqlite:///{root / 'mlflow.db'}"), by_row(root, "tiny")["tiny-long"].info.run_id
    images = sorted(file.path for file in client.list_artifacts(run_id, "images"))
    assert [path.rpartition(".")[2] for path in images] == ["webp", "png"]  # a small one for the grid
    assert all(path.startswith("images/samples+step+0+timestamp+1+") for path in images)
    pixels = read_picture(Path(client.download_artifacts(run_id, images[1], str(tmp_path))))
    assert (pixels[:, :, 0] == picture(tiny, "tiny-long")).all()
    assert "mlflow.loggedImages" in client.get_run(run_id).data.tags
    assert publish(root, tiny) == published
    assert sorted(file.path for file in client.list_artifacts(run_id, "images")) == images


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
    assert json.dumps(flatten({}))
