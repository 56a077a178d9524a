"""``python -m`` in a fork of a process that has imported torch and the rest already, at a tenth of the cost.

A small stage works for half a second after imports of five. :func:`python` is an executable for the place of
``python``: what it runs is forked from a server that was started under the exact pin and has imported what others
wrote, nothing of ours, so that a project's own copy is imported. What is about a fresh interpreter has to start one.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FORK = multiprocessing.get_context("fork")

IMPORTED = (
    *("torch", "torchvision", "timm", "timm.data", "timm.optim", "safetensors.torch", "sklearn.datasets"),
    *("PIL.Image", "pandas", "pydantic", "yaml", "jinja2", "matplotlib.figure", "mlflow"),
    *("mlflow.store.tracking.sqlalchemy_store", "dvc.cli", "dvc.repo.reproduce"),
    *("onnxscript.function_libs.torch_lib.ops", "torch.onnx._internal.exporter._core"),
)
QUIET = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
if sys.argv[1:2] != ["-m"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"*"], [0, 1, 2])
    request = {{"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    status = int(server.makefile().read() or 70)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
session = ExitStack()  # closed after the last test: ends the server


@cache
def python() -> Path:
    """An executable ``python``, in a folder with ``dvc``; its server starts with the first call."""
    from maskllm4v.utils import determinism

    folder = Path(session.enter_context(TemporaryDirectory(prefix="warm-")))
    program, address = folder / "bin/python", folder / "socket"
    program.parent.mkdir()
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.with_name("dvc").write_text(f'#!/bin/sh\nexec {program} -m dvc "$@"\n')
    for path in program.parent.iterdir():
        path.chmod(0o755)
    command = [sys.executable, __file__, str(address), json.dumps(determinism.ENVIRONMENT)]
    environment = {**os.environ, **QUIET, **determinism.ENVIRONMENT}
    server = session.enter_context(subprocess.Popen(command, env=environment))
    session.callback(server.terminate)
    while not address.exists():
        assert server.poll() is None, "the server of warm processes did not start"
        time.sleep(0.01)
    return program


def serve(address: str, pin: dict[str, str]) -> None:
    """Run programs, each in a fork of its own, next to one that waits for it and answers with its exit status."""
    gc.freeze()  # or each fork would go through all that is imported, and so copy it
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.part")
        listener.listen()
        os.rename(f"{address}.part", address)  # ready
        while True:
            connection, _ = listener.accept()
            with connection:
                FORK.Process(target=answer, args=(connection, pin)).start()
            FORK.active_children()  # lets those go that have ended


def answer(connection: socket.socket, pin: dict[str, str]) -> None:
    """Run what a connection asks for."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    program = FORK.Process(target=run, args=(json.load(connection.makefile()), streams, pin))
    program.start()
    for stream in streams:
        os.close(stream)
    program.join()
    connection.sendall(str(program.exitcode).encode())


def run(request: dict[str, Any], streams: list[int], pin: dict[str, str]) -> None:
    """Become a program: what it inherits from the one that starts it, and its module."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update({**request["environment"], **pin})
    sys.path[:1] = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    module, *sys.argv[1:] = request["arguments"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # end with the tests, however they end
    for name in IMPORTED:
        importlib.import_module(name)
    serve(sys.argv[1], json.loads(sys.argv[2]))
