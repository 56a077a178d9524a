"""Committed records as finished runs: one a row and settings, however often and by how many it is published.

A run's identity is (row, digest of its settings). Publishing the same record again changes nothing; another record of
the same identity replaces the run; other settings stand beside it. The runs of what the repository shows now carry the
tag ``current=true``; those of an experiment in a copy that DVC made stand beside them, and replace nothing.

Over HTTP nobody can lock a store. Whoever writes a run signs it until it is finished, and of equal finished ones all
writers keep the same: that with the smallest id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.names import short_names
from maskllm4v.runs.paths import ARTIFACTS, REPORTS, evaluation_folder, run_folder
from maskllm4v.runs.records import run_digest
from maskllm4v.runs.workspace import is_copy
from maskllm4v.tracking import writers
from maskllm4v.tracking.champion import publish_champion
from maskllm4v.tracking.points import Point, as_metrics, as_stored, curve_points, final_points, timestep_points
from maskllm4v.tracking.runs import (
    LIVE,
    identity,
    parameters,
    record_tags,
    report_digest,
    report_files,
    row_files,
    settings_tags,
)
from maskllm4v.tracking.store import experiment_id, insisting, open_store, runs_of
from maskllm4v.tracking.views import publish_view
from maskllm4v.utils.images import read_picture
from maskllm4v.utils.progress import bar

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

BATCH = 1000  # metrics a request, MLflow's own limit


def publish(root: Path, experiment: Experiment) -> dict[str, str]:
    """Make the store agree with the committed records of one table, and register its best row's model.

    Args:
        root: the repository's root, or that of a copy that DVC made for an experiment.
        experiment: whose records to publish; stale records are passed over.

    Returns:
        Digest of each published run's files, by row.

    Raises:
        UserError: the store cannot be opened.
    """
    root = root.resolve()
    records = current_records(experiment, root / REPORTS)
    table = aggregate(experiment, records)
    digests = {row: run_digest(run_folder(experiment.table, row, root / REPORTS)) for row in records}
    with open_store(root) as client:
        publication = _Publication(client, root, experiment)
        lines = {str(line["row"]): line for _, line in table.iterrows()}
        runs = {
            row: publication.publish(records[row], lines[row], digests[row])
            for row in bar(list(reversed(records)), f"publishing {experiment.table}")  # the UI lists the last one first
        }
        if not is_copy(root):
            publish_view(client, publication.experiment_id, metrics_of(experiment.task.name), publication.pictures())
            publish_champion(client, root, experiment, table, records, digests, runs)
    return digests


class _Publication:
    """Publishes rows of one table."""

    def __init__(self, client: MlflowClient, root: Path, experiment: Experiment) -> None:
        self.client, self.root, self.experiment = client, root, experiment
        self.experiment_id = experiment_id(client, root, experiment)
        self.beside = is_copy(root)
        self.report = report_files(root, experiment.table)
        self.report_digest = report_digest(self.report)

    def publish(self, record: Mapping[str, Any], line: pd.Series[Any], digest: str) -> str | None:
        """Have one finished run of a record; returns its id, or None where another writer's result took its place."""
        row, client = record["row"], self.client
        points = list(final_points(record, line))
        points += [*curve_points(run_folder(self.experiment.table, row, self.root / REPORTS)), *timestep_points(record)]
        same = [run for run in self._runs(row) if run.data.tags.get("settings_digest") == record["settings_digest"]]
        finished = [run for run in same if run.data.tags.get("record_digest") == digest]
        adopted: Run | None = None
        for run in same:
            if "record_digest" in run.data.tags:
                if run not in finished and not self.beside:
                    client.delete_run(run.info.run_id)  # an older result
            elif not writers.is_dead(run.data.tags):
                pass  # somebody is at it
            elif not finished and adopted is None and self._may_adopt(run, points):
                adopted = run
            else:
                client.delete_run(run.info.run_id)  # cut short
        if not finished:
            self._write(adopted, record, points, digest)
        return self._settle(row, record["settings_digest"], digest)

    def pictures(self) -> list[str]:
        """Keys of the images that its runs hold."""
        found = {path.stem for row in self.experiment.rows for path in self._pictures(row)}
        return sorted(found)

    def _pictures(self, row: str) -> list[Path]:
        return sorted(evaluation_folder(self.experiment.table, row, self.root / REPORTS).glob("*.png"))

    def _runs(self, row: str) -> list[Run]:
        return runs_of(self.client, self.experiment_id, row)

    def _may_adopt(self, run: Run, points: list[Point]) -> bool:
        """Whether a run that was watched while its row trained has nothing but what the record's curves have."""
        if LIVE not in run.data.tags or not writers.is_from(run.data.tags, self.root):
            return False
        known = {as_stored(point) for point in points}
        histories = (self.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
        return all(as_stored((m.key, m.step, m.value)) in known for history in histories for m in history)

    def _write(self, run: Run | None, record: Mapping[str, Any], points: list[Point], digest: str) -> None:
        """Write a run; what says that it is whole comes last, so that one cut short is recognised and replaced."""
        from mlflow.entities import Param, RunStatus

        client, row = self.client, record["row"]
        signed = {writers.TAG: writers.signed(self.root)}
        if run is None:
            tags = {**identity(self.experiment, row), **signed}
            name = short_names(self.experiment.rows)[row]
            run = client.create_run(self.experiment_id, run_name=name, tags=tags)
        run_id = run.info.run_id
        for key, value in signed.items():
            client.set_tag(run_id, key, value)
        if LIVE in run.data.tags:
            client.delete_tag(run_id, LIVE)
        params = [Param(key, value) for key, value in parameters(self.experiment, row).items()]
        for first in range(0, len(params), 100):
            client.log_batch(run_id, params=params[first : first + 100])
        metrics = as_metrics(points)
        for first in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics=metrics[first : first + BATCH])
        self._log_data(run_id, record)
        for path in self._pictures(row):
            # The same key, step and time in every run, so that the UI's grid lays rows side by side; no time of 0,
            # which MLflow takes for none and puts today's in its place.
            client.log_image(run_id, read_picture(path), key=path.stem, step=0, timestamp=1)
        for path, folder in row_files(self.root, self.experiment, row):
            client.log_artifact(run_id, str(path), folder)
        self._log_report(run_id)
        tags = {**settings_tags(self.experiment, row), **record_tags(self.root, record), "current": "false"}
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))
        client.delete_tag(run_id, writers.TAG)
        client.set_tag(run_id, "record_digest", digest)

    def _log_data(self, run_id: str, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        name, digest = self.experiment.data.name, record["inputs"]["manifest"]
        manifest = ARTIFACTS / "data" / name / "manifest.json"
        source = json.dumps({"uri": manifest.as_posix(), "sha256": digest})
        data = Dataset(name, digest[:32], "local", source)
        insisting(lambda: self.client.log_inputs(run_id, [DatasetInput(data)]))

    def _log_report(self, run_id: str) -> None:
        for path in self.report:
            self.client.log_artifact(run_id, str(path), "report")
        self.client.set_tag(run_id, "report_digest", self.report_digest)

    def _settle(self, row: str, settings_digest: str, digest: str) -> str | None:
        """Of equal runs keep one, and make it the row's current one, with the present report; returns its id.

        None where another writer has another result of the same settings, and was faster.
        """
        from mlflow.exceptions import MlflowException

        wanted = {"settings_digest": settings_digest, "record_digest": digest}
        while equal := [run for run in self._runs(row) if wanted.items() <= run.data.tags.items()]:
            kept, *others = sorted(equal, key=lambda run: run.info.run_id)
            for run in others:
                self.client.delete_run(run.info.run_id)
            try:
                if not self.beside or any(run.data.tags["current"] == "true" for run in others):
                    self._make_current(kept)
            except MlflowException:
                if self.client.get_run(kept.info.run_id).info.lifecycle_stage == "active":
                    raise
                continue  # another writer keeps an equal one that was finished since
            return str(kept.info.run_id)
        return None

    def _make_current(self, kept: Run) -> None:
        row, run_id = kept.data.tags["row"], kept.info.run_id
        if kept.data.tags["current"] != "true":
            self._retire([run for run in self._current(row) if run.info.run_id != run_id])
            self.client.set_tag(run_id, "current", "true")
            self._retire(self._current(row)[1:])  # of two that came at once
        if kept.data.tags.get("report_digest") != self.report_digest:
            self._log_report(run_id)

    def _retire(self, runs: list[Run]) -> None:
        from mlflow.exceptions import MlflowException

        for run in runs:
            with suppress(MlflowException):  # deleted by another writer
                self.client.set_tag(run.info.run_id, "current", "false")

    def _current(self, row: str) -> list[Run]:
        found = [run for run in self._runs(row) if run.data.tags.get("current") == "true"]
        return sorted(found, key=lambda run: run.info.run_id)
