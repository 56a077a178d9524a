"""Locks that the kernel frees when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskllm4v.utils.errors import UserError


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file inside; it is gone afterwards. Forked processes hold it, too, until they have ended.

    Where there can be no such file (a full disk, a file system without locks), a line says so, and that is all.

    Args:
        path: of the file.
        what: who else may not, for the message, e.g. ``"row 'x' is trained"``.

    Raises:
        UserError: another process holds it; names that one.
    """
    try:
        descriptor = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{what} by {_holder(path)} already; wait for it, or end it") from None
    except OSError as error:
        print(f"{path}: no lock ({error.strerror}), so nobody else is kept away", file=sys.stderr)
        yield
        return
    try:
        with suppress(OSError):  # a full disk: it is held, and does not say by whom
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        _free(path, descriptor)


@contextmanager
def queued(path: Path) -> Iterator[None]:
    """Hold a lock file inside, after all who came before; it is gone afterwards.

    Raises:
        OSError: there can be no such file.
    """
    descriptor = _locked(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _free(path, descriptor)


def _free(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        path.unlink()  # while it is held: who opened it before looks again, and makes a new one
    os.close(descriptor)


def _locked(path: Path, how: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, how)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just removed it


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace").strip() or "another process"
    return "another process"
