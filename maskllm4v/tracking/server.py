"""``MLFLOW_TRACKING_URI`` before MLflow sees it: no password stays in it, and databases that cannot be are refused."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from maskllm4v.runs.workspace import SERVER
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.redaction import redact_all
from maskllm4v.utils.text import one_line

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"  # MLflow's own


def prepare_address() -> None:
    """Move user and password of a server to the variables that MLflow has for them, so that no message repeats them.

    Raises:
        UserError: a database of a kind that is unknown or not installed, or a file that is none or cannot be one.
    """
    redact_all()
    try:
        found = urlsplit(os.environ.get(SERVER, ""))
    except ValueError as error:
        raise UserError(f"{SERVER} is no address: {one_line(error)}") from None
    if found.scheme in ("http", "https"):
        about, _, host = found.netloc.rpartition("@")
        user, _, password = about.partition(":")
        if user and password:
            os.environ |= {USER: unquote(user), PASSWORD: unquote(password)}
            os.environ[SERVER] = found._replace(netloc=host).geturl()
    elif found.scheme:
        _check_database(os.environ[SERVER])


def _check_database(address: str) -> None:
    """MLflow would try for minutes."""
    from mlflow.store.db.db_types import DATABASE_ENGINES
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    if address.partition(":")[0].partition("+")[0] not in DATABASE_ENGINES:
        return  # MLflow says at once what it takes
    try:
        url = make_url(address)
        url.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
        raise UserError(f"{SERVER} is {address}: {one_line(error)}") from None
    if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(url.database)) as database:
                database.execute("PRAGMA schema_version")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{SERVER} is {address}: {one_line(error)}") from None
