"""What somebody tried on MLflow: two clones that create one file, and servers that accept and never answer."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_records import DIGITS, make_records
from mlflow_server import runs, their_warnings
from small_project import said, together
from test_tracking import ROWS

from maskllm4v.config import Experiment
from maskllm4v.tracking import store
from maskllm4v.tracking.publishing import publish
from maskllm4v.utils.errors import UserError


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", *store.LIMITS):
        monkeypatch.delenv(name, raising=False)
    with their_warnings():
        yield
    for name in store.LIMITS:
        os.environ.pop(name, None)


def records(folder: Path) -> Experiment:
    experiment = Experiment.model_validate(DIGITS.model_dump())
    make_records(experiment, folder / "reports", ROWS)
    return experiment


# One new file


def publish_into(uri: str) -> None:
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (so that both are as fast as each other)

    os.environ |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    Path("ready").touch()
    while not all((Path("..") / name / "ready").exists() for name in ("one", "two")):
        pass
    with their_warnings():
        publish(Path.cwd(), Experiment.model_validate(DIGITS.model_dump()))


@pytest.mark.slow
def test_two_clones_create_one_file(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        records(folder)
    uri = f"sqlite:///{tmp_path}/shared.db"
    codes = together(folders, publish_into, uri, processes=2)
    assert codes == [0, 0], [said(folder, rank) for rank, folder in enumerate(folders)]
    assert Counter(run.data.tags["row"] for run in runs(uri, "digits")) == Counter(ROWS)
    assert not (tmp_path / "shared.db-lock").exists()


# Servers that do not answer


@dataclass
class Silent:
    uri: str
    calls: int = 0


@contextmanager
def silent_server() -> Iterator[Silent]:
    """Accepts connections, reads what is asked, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found, open_ones = Silent(f"http://127.0.0.1:{listener.getsockname()[1]}"), []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    open_ones.append(listener.accept())
                    found.calls += 1

        threading.Thread(target=accept, daemon=True).start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)
        for connection, _ in open_ones:
            connection.close()


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is dead: an error of one line, after as many tries as the limits say."""
    monkeypatch.setattr(store, "LIMITS", dict(zip(store.LIMITS, ("1", "1"), strict=True)))
    with silent_server() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with pytest.raises(UserError, match="is MLFLOW_TRACKING_URI right, and does it answer") as caught:
            publish(tmp_path, records(tmp_path))
        assert server.calls == 2
    assert "\n" not in str(caught.value)
    assert "ReadTimeout" in str(caught.value)


@pytest.mark.parametrize("limits", [store.LIMITS, store.UPLOAD])
def test_limits_are_tens_of_seconds(limits: dict[str, str]) -> None:
    """Tries, and the pauses between them: none before the first repetition, then 4, 8, ... seconds and up to 1 more."""
    timeout, retries = (int(limits[name]) for name in store.LIMITS)
    assert (1 + retries) * timeout + sum(2 * 2**n + 1 for n in range(1, retries)) + 1 <= 61


def test_an_environment_has_its_own_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "500")
    with store.open_store(tmp_path):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "500"
        with store.upload_limit():
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "500"
            assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == store.UPLOAD["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
        assert {name: os.environ[name] for name in store.LIMITS} == {
            **store.LIMITS,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "500",
        }


@pytest.mark.parametrize("method", ["log_artifact", "log_inputs"])
def test_a_server_that_falls_silent_on_the_way(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked last: one line, and no second wait; the same command then ends what was begun."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from requests.exceptions import ReadTimeout

    experiment, call, asked = records(tmp_path), getattr(MlflowClient, method), []

    def silent(*arguments: Any, **options: Any) -> Any:
        asked.append(method)
        try:
            raise ReadTimeout("read timed out")
        except ReadTimeout as error:
            raise MlflowException("API request to x failed\nwith timeout") from error

    monkeypatch.setattr(MlflowClient, method, silent)
    with pytest.raises(UserError, match=r"^MLflow's server does not answer any more; .+\(API request to x failed with"):
        publish(tmp_path, experiment)
    assert len(asked) == 1
    monkeypatch.setattr(MlflowClient, method, call)
    publish(tmp_path, experiment)
    found = runs(f"sqlite:///{tmp_path}/mlflow.db", "digits")
    assert Counter(run.data.tags["row"] for run in found) == Counter(ROWS)
    assert {run.info.status for run in found} == {"FINISHED"}
