"""Records published to a real server over HTTP, and by two writers at once: one run of each, and none damaged."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from made_diffusion import diffusion
from made_diffusion import make_records as make_diffusion_records
from made_records import DIGITS, make_records
from mlflow_server import content, runs, server, their_warnings
from small_project import said, together
from test_tracking import ROWS, variant_of

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import record_file
from maskllm4v.tracking import publishing, writers
from maskllm4v.tracking.publishing import publish
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.processes import began

LEARNED = ROWS[-1]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with their_warnings():
        yield


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("server")) as found:
        yield found.uri


def records(folder: Path, table: str) -> Experiment:
    """Those of a table of its own, so that tests can share a server."""
    experiment = Experiment.model_validate({**DIGITS.model_dump(), "table": table})
    make_records(experiment, folder / "reports", ROWS)
    return experiment


def finished(uri: str, table: str) -> list[Any]:
    found = runs(uri, table)
    assert all(run.info.status == "FINISHED" for run in found)
    assert not [run for run in found if {writers.TAG, "live"} & run.data.tags.keys()]
    return found


@pytest.mark.slow
def test_over_http_as_into_a_file(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number, tag and file, through the server's proxy, and once."""
    from mlflow.tracking import MlflowClient

    tiny = diffusion()
    make_diffusion_records(tiny, tmp_path / "reports")
    publish(tmp_path, tiny)
    local = {run.data.tags["row"]: run.info.run_id for run in runs(f"sqlite:///{tmp_path}/mlflow.db", "tiny")}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for _ in range(2):
        publish(tmp_path, tiny)
        remote = {run.data.tags["row"]: run.info.run_id for run in finished(uri, "tiny")}
        assert len(runs(uri, "tiny")) == len(tiny.rows)
    assert remote.keys() == local.keys()
    for row, run_id in remote.items():
        assert content(uri, run_id) == content(f"sqlite:///{tmp_path}/mlflow.db", local[row])
    record = record_file("tiny", "tiny-long", tmp_path / "reports")
    copy = MlflowClient(uri).download_artifacts(remote["tiny-long"], "evaluation/record.json", str(tmp_path))
    assert Path(copy).read_bytes() == record.read_bytes()


def publish_together(uri: str, table: str, lr: float | None) -> None:
    """Publish; every run is begun when the other process has looked for it, too, and its data logged at one time."""
    os.environ |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    root, write, log_data = Path.cwd(), publishing._Publication._write, publishing._Publication._log_data
    experiment = records(root, table)
    if lr is not None and root.name == "two":
        experiment = variant_of(experiment, LEARNED, root, lr)

    def meet(place: str) -> None:
        (root / place).touch()
        end = time.monotonic() + 60
        while not all((root.parent / name / place).exists() for name in ("one", "two")) and time.monotonic() < end:
            time.sleep(0.001)

    def writing(self: Any, run: Any, record: dict[str, Any], *arguments: Any) -> None:
        meet(f"at-{record['row']}")
        write(self, run, record, *arguments)

    def logging(self: Any, run_id: str, record: dict[str, Any]) -> None:
        meet(f"data-{record['row']}")
        log_data(self, run_id, record)

    publishing._Publication._write = writing  # type: ignore[method-assign]
    publishing._Publication._log_data = logging  # type: ignore[method-assign]
    with their_warnings():
        publish(root, experiment)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [None, 0.5], ids=["the same", "other settings"])
def test_two_writers_at_once(lr: float | None, uri: str, tmp_path: Path) -> None:
    """From two repositories: of equal runs one stays, whole; of different ones both, and one is current."""
    table = "same" if lr is None else "others"
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    codes = together(folders, publish_together, uri, table, lr, processes=2)
    assert codes == [0, 0], [said(folder, rank) for rank, folder in enumerate(folders)]
    found = finished(uri, table)
    assert Counter(run.data.tags["row"] for run in found) == {
        row: 1 + (lr is not None) * (row == LEARNED) for row in ROWS
    }
    assert Counter(run.data.tags["row"] for run in found if run.data.tags["current"] == "true") == dict.fromkeys(
        ROWS, 1
    )
    alone = tmp_path / "alone"
    publish(alone, records(alone, table))
    store = f"sqlite:///{alone}/mlflow.db"
    whole = {run.data.tags["settings_digest"]: content(store, run.info.run_id) for run in runs(store, table)}
    for run in found:
        if wanted := whole.pop(run.data.tags["settings_digest"], None):
            have = content(uri, run.info.run_id)
            for one in (have, wanted):
                del one["tags"]["current"]
            assert have == wanted
    assert not whole


def publish_here(table: str) -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with their_warnings():
        publish(Path.cwd(), Experiment.model_validate({**DIGITS.model_dump(), "table": table}))


@pytest.mark.slow
def test_two_writers_create_one_file(tmp_path: Path) -> None:
    records(tmp_path, "digits")
    assert together(tmp_path, publish_here, "digits", processes=2) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    assert Counter(run.data.tags["row"] for run in finished(f"sqlite:///{tmp_path}/mlflow.db", "digits")) == Counter(
        ROWS
    )


def test_the_unfinished_run_of_a_living_writer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    experiment, store = records(tmp_path, "digits"), f"sqlite:///{tmp_path}/mlflow.db"
    publish(tmp_path, experiment)
    client, mine = MlflowClient(store), next(run for run in runs(store, "digits") if run.data.tags["row"] == LEARNED)
    tags = {key: mine.data.tags[key] for key in ("row", "settings_digest")}
    host, _, _, repository, _ = writers.signed(tmp_path).split(" ")
    living, now = f"{host} {os.getppid()} {began(os.getppid())} {repository}", f"{time.time():.0f}"
    signed = {
        "living": f"{living} {now}",
        "dead": f"{host} {2**22 + 1} 1 {repository} {now}",
        "number used again": f"{host} {os.getppid()} 1 {repository} {now}",
        "another host": f"elsewhere 1 1 {repository} {now}",
        "another host, long ago": f"elsewhere 1 1 {repository} 1000000000",
        "nobody": "",
    }
    ids = {
        name: client.create_run(mine.info.experiment_id, tags={**tags, writers.TAG: text}).info.run_id
        for name, text in signed.items()
    }
    publish(tmp_path, experiment)
    left = {run.info.run_id for run in runs(store, "digits")}
    assert {name for name, run_id in ids.items() if run_id in left} == {"living", "another host"}
    assert mine.info.run_id in left


@pytest.mark.parametrize("method", ["log_inputs", "set_experiment_tag"])
@pytest.mark.parametrize("refusals", [1, 2])
def test_what_another_writer_inserts_just_now(
    method: str, refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database refuses the second of two insertions; who asks again finds it there. Other errors are errors."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    experiment, store = records(tmp_path, "digits"), f"sqlite:///{tmp_path}/mlflow.db"
    call, left = getattr(MlflowClient, method), [None] * refusals

    def refused(*arguments: Any) -> None:
        if left:
            left.pop()
            raise MlflowException("UNIQUE constraint failed")
        call(*arguments)

    monkeypatch.setattr(MlflowClient, method, refused)
    with nullcontext() if refusals == 1 else pytest.raises(MlflowException, match="UNIQUE"):
        publish(tmp_path, experiment)
        assert not left
        found = finished(store, "digits")
        assert len(found) == len(ROWS)
        assert all(len(run.inputs.dataset_inputs) == 1 for run in found)


def test_no_server_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens to `discard`
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="is MLFLOW_TRACKING_URI right, and does it answer") as caught:
        publish(tmp_path, records(tmp_path, "digits"))
    assert "\n" not in str(caught.value)
