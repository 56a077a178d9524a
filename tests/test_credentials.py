"""User information of an address is nowhere in what a run prints, logs or writes down; servers get it all the same."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from import_graph import ROOT
from made_records import make_records
from small_params import params
from small_pipeline import ENVIRONMENT, write_params

from maskllm4v.config import parse_experiment
from maskllm4v.tracking.server import prepare_address
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.redaction import redact_all, redacted

WHO, SECRET = "s0meb0dy", "t0ps3cret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://u:p@host:5000/x failed", "at http://***@host:5000/x failed"),
        ("postgresql+psycopg2://u:p@host/db", "postgresql+psycopg2://***@host/db"),
        ("https://token@host", "https://***@host"),
        ("http://u:p@ss@host/x", "http://***@host/x"),
        ("http://u:p/ss@host/x", "http://***@host/x"),
        ("http://u:@host and ssh://git@host:x", "http://***@host and ssh://***@host:x"),
        ("http://host:5000/a@b, a@b, 'x://y'", "http://host:5000/a@b, a@b, 'x://y'"),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@given(st.text("abc:@%!$&()*+,;=._~-'|^"), st.text("abc:/@%!?#'"))
def test_no_user_or_password_is_left(user: str, password: str) -> None:
    found = redacted(f"got http://§{user}:x§{password}@host/a, twice")
    assert "§" not in found
    assert found == "got http://***@host/a, twice"


def test_logs_and_tracebacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    before = logging.getLogRecordFactory()
    logger, handler = logging.getLogger("of this test"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        redact_all()
        try:
            raise RuntimeError(f"http://{WHO}:{SECRET}@host")
        except RuntimeError as error:
            logger.exception("lost %s", f"http://{WHO}:{SECRET}@host")
            sys.excepthook(RuntimeError, error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    said = capsys.readouterr().err
    assert said.count("RuntimeError: http://***@host") == 2
    assert "lost http://***@host" in said
    assert SECRET not in said


@pytest.fixture
def project(tmp_path: Path) -> Path:
    experiment = params() | {"runtime": {"device": "cpu"}}
    (tmp_path / "experiments").mkdir()
    write_params(tmp_path, experiment)
    make_records(parse_experiment(experiment), tmp_path / "reports", ["dense", "one"])
    return tmp_path


@contextmanager
def refusing() -> Iterator[tuple[str, list[str]]]:
    """A server that knows nobody: its address, and the credentials that it gets."""
    heard: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Authorization", ""))
            body = json.dumps({"error_code": "UNAUTHENTICATED", "message": "who are you?"}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815  # http.server's name

        def log_message(self, *_: object) -> None: ...

    found = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{found.server_port}", heard
    finally:
        found.shutdown()
        found.server_close()


def run(project: Path, address: str, *command: str, told: str = "") -> subprocess.CompletedProcess[str]:
    variables = {"MLFLOW_TRACKING_URI": address, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project,
        env={**ENVIRONMENT, **variables},
        input=told,
        capture_output=True,
        text=True,
        check=False,
    )


def check_nothing_says_it(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    written = b"".join(path.read_bytes() for path in project.rglob("*") if path.is_file())
    everything = written.decode(errors="replace") + done.stdout + done.stderr
    assert not [secret for secret in (WHO, SECRET) if secret in everything], done.stderr


@pytest.mark.parametrize(("what", "alive"), [("track", True), ("track", False), ("sender", True)])
def test_server(what: str, alive: bool, project: Path) -> None:
    """One that says no, and one that is dead."""
    with refusing() as (host, heard):
        address = f"http://{WHO}:{SECRET}@{host if alive else '127.0.0.1:9'}"
        told = parse_experiment(params() | {"runtime": {"device": "cpu"}}).model_dump_json() + "\n"
        command = ("stages.track",) if what == "track" else ("maskllm4v.tracking.sender", "own")
        done = run(project, address, *command, told=told)
    assert done.returncode == (1 if what == "track" else 0)
    assert ("MLflow's store cannot be opened" if what == "track" else "MLflow cannot be reached") in done.stderr
    assert "Traceback" not in done.stderr
    if alive:
        assert set(heard) == {"Basic " + base64.b64encode(f"{WHO}:{SECRET}".encode()).decode()}
    check_nothing_says_it(project, done)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"postgresql+nothing://{WHO}:{SECRET}@host/db", "Can't load plugin: sqlalchemy.dialects:postgresql.nothing"),
        (f"mssql+pymssql://{WHO}:{SECRET}@host/db", "No module named 'pymssql'"),
        (f"http://{WHO}:{SECRET}@[host/db", "is no address: Invalid IPv6 URL"),
        ("sqlite:////dev/null/x.db", "File exists"),
        ("sqlite:///experiments", "unable to open database file"),
        ("sqlite:///params.yaml", "file is not a database"),
    ],
)
def test_a_database_that_cannot_be_is_one_line(
    address: str, said: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        prepare_address()
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", ["", "mlruns", "http://host:5000", f"https://{WHO}@host", "sqlite:///new/x.db"])
def test_other_addresses_stay(address: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(project)
    prepare_address()
    assert os.environ["MLFLOW_TRACKING_URI"] == address
