"""The store that runs are kept in: ``MLFLOW_TRACKING_URI``, or a sqlite file at the repository's root."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from maskllm4v.config import Experiment
from maskllm4v.reporting.marks import escaped
from maskllm4v.runs.workspace import SERVER, STORE, main_root
from maskllm4v.tracking.server import prepare_address
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.redaction import redacted

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

ARTIFACT_ROOT = "mlruns"
STAMPS = Path(ARTIFACT_ROOT) / "published"  # what was published, by table


@contextmanager
def open_store(root: Path) -> Iterator[MlflowClient]:
    """A client of the store, for one process of a repository at a time: the others queue.

    Two processes that create a sqlite file at once would break it; and over HTTP there is no lock but this one.

    Raises:
        UserError: there is no such store, or its server does not answer.
    """
    from mlflow.exceptions import MlflowException

    lock = main_root(root) / ARTIFACT_ROOT / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # half a minute; by default four
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            client = connect(root)
        except MlflowException as error:
            said = redacted(" ".join(str(error).split()))[:300]
            raise UserError(
                f"MLflow's store cannot be opened; is {SERVER} right, and does it answer? ({said})"
            ) from error
        yield client


def connect(root: Path) -> MlflowClient:
    """A client of the store, which exists afterwards."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run, over HTTP
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    prepare_address()
    main = main_root(root)
    with chdir(main):  # MLflow puts artifacts of its default experiment below the current folder
        client = MlflowClient(os.environ.get(SERVER) or f"sqlite:///{main / STORE}")
        client.search_experiments(max_results=1)
    return client


def experiment_id(client: MlflowClient, root: Path, experiment: Experiment) -> str:
    """The MLflow experiment of a table, made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(experiment.table)
    if found is None:
        place = None if os.environ.get(SERVER) else (main_root(root) / ARTIFACT_ROOT / experiment.table).as_uri()
        try:
            return str(
                client.create_experiment(experiment.table, place, {"mlflow.note.content": escaped(experiment.title)})
            )
        except MlflowException:  # another writer was faster
            if (found := client.get_experiment_by_name(experiment.table)) is None:
                raise
    if found.lifecycle_stage == "deleted":  # in the UI, by somebody
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def insisting(write: Callable[[], object]) -> None:
    """Write what another writer may be inserting: of two at once the database refuses one, who then finds it there."""
    from mlflow.exceptions import MlflowException

    try:
        write()
    except MlflowException:
        write()


def runs_of(client: MlflowClient, experiment: str, row: str) -> list[Run]:
    """All runs of a row that were not deleted, oldest first."""
    found, token = [], None
    while True:
        page = client.search_runs(
            [experiment], f"tags.row = '{row}'", max_results=1000, order_by=["start_time ASC"], page_token=token
        )
        found += page
        if not (token := page.token):
            return found
