"""A real MLflow server on a free port, and what its store or any other holds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_pipeline import ENVIRONMENT
from small_project import until


@dataclass
class Server:
    uri: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server whose database and artifacts lie in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "./stored"]
    with (folder / "server.txt").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    found = Server(f"http://127.0.0.1:{port}", process)

    def answers() -> bool:
        assert process.poll() is None, (folder / "server.txt").read_text()
        with suppress(OSError), urllib.request.urlopen(f"{found.uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    try:
        until(answers)
        yield found
    finally:
        found.stop()


@contextmanager
def their_warnings() -> Iterator[None]:
    """Inside, what MLflow and its database layers warn about themselves is no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def runs(uri: str, table: str) -> list[Any]:
    """All runs of a table that were not deleted, the oldest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(table)
    return [] if found is None else list(client.search_runs([found.experiment_id], order_by=["start_time ASC"]))


def content(uri: str, run_id: str) -> dict[str, Any]:
    """All that a run says, but for names and times that differ from run to run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)

    def files(folder: str | None = None) -> list[str]:
        found = []
        for file in client.list_artifacts(run_id, folder):
            found += files(file.path) if file.is_dir else [file.path]
        return found

    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "tags": {k: v for k, v in run.data.tags.items() if k != "git_commit"},
        "points": {
            k: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, k))
            for k in run.data.metrics
        },
        "data": [data.dataset.digest for data in run.inputs.dataset_inputs],
        "files": sorted(path for path in files() if not path.startswith("images/")),
        "images": len([path for path in files() if path.startswith("images/")]),
    }
