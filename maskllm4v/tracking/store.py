"""The store that runs are kept in: ``MLFLOW_TRACKING_URI``, or a sqlite file at the repository's root."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from maskllm4v.config import Experiment
from maskllm4v.reporting.marks import escaped
from maskllm4v.runs.workspace import SERVER, STORE, main_root
from maskllm4v.tracking.server import prepare_address
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.locks import queued
from maskllm4v.utils.redaction import redacted

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

ARTIFACT_ROOT = "mlruns"
STAMPS = Path(ARTIFACT_ROOT) / "published"  # what was published, by table
# Of requests, unless the environment has others. A server that hangs costs less than a minute, one that is dead a few
# seconds; by MLflow's own limits it would be a quarter of an hour.
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
UPLOAD = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@contextmanager
def open_store(root: Path) -> Iterator[MlflowClient]:
    """A client of the store, for one process of a repository at a time: the others queue.

    Over HTTP there is no lock but this one.

    Raises:
        UserError: there is no such store, or its server does not answer, then or later.
    """
    from mlflow.exceptions import MlflowException

    lock = main_root(root) / ARTIFACT_ROOT / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            client = connect(root)
        except MlflowException as error:
            raise UserError(
                f"MLflow's store cannot be opened; is {SERVER} right, and does it answer? ({_one_line(error)})"
            ) from error
        try:
            yield client
        except MlflowException as error:
            if not is_silence(error):
                raise
            raise UserError(
                f"MLflow's server does not answer any more; the same command goes on from there ({_one_line(error)})"
            ) from error


def is_silence(error: BaseException | None) -> bool:
    """Whether MLflow's error is that a request got no answer, or none in time."""
    from requests.exceptions import RequestException

    while error is not None:
        if isinstance(error, RequestException):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def upload_limit() -> Iterator[None]:
    """Inside, one request may take as long as all tries of another one: a server answers when it has stored a file."""
    ours = [name for name, value in LIMITS.items() if os.environ.get(name) == value]
    os.environ |= {name: UPLOAD[name] for name in ours}
    try:
        yield
    finally:
        os.environ |= {name: LIMITS[name] for name in ours}


def _one_line(error: Exception) -> str:
    return redacted(" ".join(str(error).split()))[:300]


def connect(root: Path) -> MlflowClient:
    """A client of the store, which exists afterwards."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run, over HTTP
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    prepare_address()
    main = main_root(root)
    uri = os.environ.get(SERVER) or f"sqlite:///{main / STORE}"
    # MLflow puts artifacts of its default experiment below the current folder.
    with chdir(main), _creation(uri):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def _creation(uri: str) -> AbstractContextManager[None]:
    """Inside, nobody else creates the tables of the same sqlite file, whichever repository they are in."""
    scheme, _, path = uri.partition(":///")
    file = Path(path.partition("?")[0])
    if scheme != "sqlite" or not os.access(file.parent, os.W_OK):  # MLflow says what is wrong with it
        return nullcontext()
    return queued(file.with_name(f"{file.name}-lock"))


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
    except MlflowException as error:
        if is_silence(error):
            raise
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
