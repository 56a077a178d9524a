"""Committed records as MLflow runs: one run a row, one experiment a table. The only module with mlflow.

A run's identity is (row, digest of its settings). Publishing the same record again changes nothing;
another record of the same identity replaces the run; other settings stand beside it. The runs that the
README shows now carry the tag ``current=true``.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.layout import ARTIFACTS, evaluation_folder, export_folder, run_folder
from maskllm4v.metrics import METRICS, by_timestep
from maskllm4v.pictures import read_picture
from maskllm4v.progress import bar
from maskllm4v.records import run_digest
from maskllm4v.reporting.aggregate import aggregate, current_records, seed_metrics, timestep_metrics

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

DEFAULT_STORE = "mlflow.db"  # sqlite, at the repository's root; git-ignored and disposable
ARTIFACT_ROOT = "mlruns"
LARGEST_ARTIFACT = 32 * 2**20  # bytes of masks; with updated weights of a large model they stay in DVC's cache
BATCH = 1000  # metrics a request, MLflow's own limit

METHODS = {  # stage and method of a kind of row; None: the one-shot method's own name
    "dense": ("dense", "dense"),
    "oneshot": ("prior", None),
    "learned": ("train", "maskllm"),
    "finetuned": ("finetune", "finetune"),
}


def publish(root: Path, experiment: Experiment) -> dict[str, str]:
    """Make the store agree with the committed records of one table.

    The store is ``MLFLOW_TRACKING_URI``, or a sqlite file at the repository's root.

    Args:
        root: the repository's root.
        experiment: whose records to publish; stale records are passed over.

    Returns:
        Digest of each published run's files, by row.
    """
    records = current_records(experiment, root / "reports")
    lines = {str(line["row"]): line for _, line in aggregate(experiment, records).iterrows()}
    published: dict[str, str] = {}
    with _client(root) as client:
        experiment_id = _experiment_id(client, experiment)
        for row in bar(records, f"publishing {experiment.table}"):
            digest = run_digest(run_folder(experiment.table, row, root / "reports"))
            _publish_row(client, experiment_id, root, experiment, records[row], lines[row], digest)
            published[row] = digest
    return published


def _publish_row(
    client: MlflowClient,
    experiment_id: str,
    root: Path,
    experiment: Experiment,
    record: Mapping[str, Any],
    line: pd.Series[Any],
    digest: str,
) -> None:
    runs = client.search_runs([experiment_id], f"tags.row = '{record['row']}'", max_results=1000)
    there = None
    for run in runs:
        same_settings = run.data.tags.get("settings_digest") == record["settings_digest"]
        if same_settings and run.data.tags.get("record_digest") == digest and there is None:
            there = run
        elif same_settings:
            client.delete_run(run.info.run_id)  # an older result, or one whose publishing was cut short
        elif run.data.tags.get("current") == "true":
            client.set_tag(run.info.run_id, "current", "false")
    if there is None:
        _create(client, experiment_id, root, experiment, record, line, digest)
    elif there.data.tags.get("current") != "true":
        client.set_tag(there.info.run_id, "current", "true")


def _create(
    client: MlflowClient,
    experiment_id: str,
    root: Path,
    experiment: Experiment,
    record: Mapping[str, Any],
    line: pd.Series[Any],
    digest: str,
) -> None:
    from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunStatus

    row, reports = record["row"], root / "reports"
    # Tags that identify a finished run come last, so that a run cut short is recognised and replaced.
    identity = {"row": row, "settings_digest": record["settings_digest"]}
    run: Run = client.create_run(experiment_id, run_name=row, tags=identity)
    run_id = run.info.run_id

    params = [Param(key, str(value)[:6000]) for key, value in flatten(record["settings"]).items()]
    metrics = [Metric(key, value, 0, 0) for key, value in final_metrics(record, line).items()]
    lines = [*curve_metrics(run_folder(experiment.table, row, reports)), *timestep_lines(record)]
    metrics += [Metric(key, value, step, step) for key, step, value in lines]
    for first in range(0, max(len(params), 1), 100):
        client.log_batch(run_id, params=params[first : first + 100])
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH])

    manifest = ARTIFACTS / "data" / experiment.data.name / "manifest.json"
    source = json.dumps({"uri": manifest.as_posix(), "sha256": record["inputs"]["manifest"]})
    data = Dataset(experiment.data.name, record["inputs"]["manifest"][:32], "local", source)
    client.log_inputs(run_id, [DatasetInput(data)])

    for path in sorted(evaluation_folder(experiment.table, row, reports).glob("*.png")):
        # The same key, step and time in every run, so that the UI's grid lays rows side by side; no time of 0, which
        # MLflow takes for none and puts today's in its place.
        client.log_image(run_id, read_picture(path), key=path.stem, step=0, timestamp=1)
    for path, folder in _artifact_files(root, experiment, row):
        client.log_artifact(run_id, str(path), folder)
    for key, value in {**_tags(root, experiment, record), "record_digest": digest, "current": "true"}.items():
        client.set_tag(run_id, key, value)
    client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key`` names; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def final_metrics(record: Mapping[str, Any], line: pd.Series[Any]) -> dict[str, float]:
    """``top1`` (mean), ``top1_std``, ``top1/seed0`` and so on, and the headline's paired difference to dense."""
    task = METRICS[record["settings"]["task"]["name"]]
    found: dict[str, float] = {}
    for name, values in seed_metrics(record).items():
        if not any(by_timestep({str(name): 0.0})):  # those are lines of their own
            found |= {str(name): values.mean(), f"{name}_std": values.std()}
            found |= {f"{name}/seed{seed}": value for seed, value in values.items()}
    delta = f"{task.headline.name}_delta"
    found |= {delta: line["delta_mean"], f"{delta}_std": line["delta_std"]}
    found |= {f"parameters_{name}": float(count) for name, count in record["parameters"].items()}
    return {name: float(value) for name, value in found.items() if not math.isnan(value)}


def curve_metrics(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Training curves as (``train/<column>``, step, mean over seeds)."""
    frames = [pd.read_csv(path) for path in sorted(folder.glob("curves/seed*.csv"))]
    if not frames:
        return
    mean = pd.concat(frames).groupby("step").mean()
    for column in mean.columns:
        for step, value in mean[column].items():
            yield f"train/{column}", int(str(step)), float(value)


def timestep_lines(record: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Metrics by timestep of the noise schedule, as (``timesteps/<metric>``, timestep, mean over seeds)."""
    for name, values in timestep_metrics(record).items():
        for timestep, value in values.items():
            yield f"timesteps/{name}", timestep, value


def _tags(root: Path, experiment: Experiment, record: Mapping[str, Any]) -> dict[str, str]:
    row, kind, settings = record["row"], record["kind"], record["settings"]
    stage, method = METHODS[kind]
    start = settings["learning"]["prior"] if kind == "learned" else settings.get("finetuning", {}).get("start", "")
    tags = {
        "stage": stage,
        "task": settings["task"]["name"],
        "method": method or settings["prior"]["method"],
        "prior": start,
        "pattern": settings.get("pattern", "dense"),
        "model": settings["model"]["name"],
        "exact": str(record["exact"]).lower(),
        "hardware": record["made"]["hardware"],
        "world_size": str(record["made"]["world_size"]),
        "git_commit": _git_commit(root),
        "mlflow.note.content": experiment.rows[row],
    }
    return {key: value for key, value in tags.items() if value}


def _artifact_files(root: Path, experiment: Experiment, row: str) -> Iterator[tuple[Path, str | None]]:
    """Files of a run and the folder each goes to; masks and exported models only where they lie on this machine."""
    reports = root / "reports" / experiment.table
    folder = run_folder(experiment.table, row, root / "reports")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parent = path.relative_to(folder).parent.as_posix()
            yield path, None if parent == "." else parent
    for path in [reports / "table.md", reports / "exports.md", *sorted((reports / "figures").glob("*.png"))]:
        if path.is_file():
            yield path, "report"
    if row != experiment.dense.row:
        for path in sorted((root / ARTIFACTS / row).glob("*.safetensors")):
            if path.stat().st_size <= LARGEST_ARTIFACT:
                yield path, "masks"
    for path in sorted((root / export_folder(row)).glob("*")):  # all of them: somebody asked for each
        yield path, "export"


def _git_commit(root: Path) -> str:
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _experiment_id(client: MlflowClient, experiment: Experiment) -> str:
    found = client.get_experiment_by_name(experiment.table)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(experiment.table, tags={"mlflow.note.content": experiment.title}))


@contextmanager
def _client(root: Path) -> Iterator[MlflowClient]:
    """A client of the store; two processes that create the default one at once would break it, so they queue."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        yield MlflowClient(uri)
        return
    store = root.resolve() / DEFAULT_STORE
    lock = root / ARTIFACT_ROOT / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    here = Path.cwd()
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.chdir(root)  # MLflow puts artifacts below the current folder
        try:
            yield MlflowClient(f"sqlite:///{store}")
        finally:
            os.chdir(here)
