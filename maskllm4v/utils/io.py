"""Writing files whole or not at all, and digests."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from maskllm4v.utils.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same folder; rename it to ``path`` if all went well.

    A link stays, and what it leads to is replaced; a file that was there keeps its mode. A link to a file that nobody
    may write to, as DVC makes them to its cache, is replaced itself.

    Raises:
        UserError: the folder cannot be written to, the disk is full, or links lead in a circle.
    """
    try:
        target, mode = _led_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)  # or a rename may outlive the content when the power fails
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _led_to(path: Path) -> tuple[Path, int]:
    """The file to replace when ``path`` is written to, and its mode; of a new one as the umask has it."""
    new = 0o666 & ~_umask()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:  # or a link to nothing yet
        return Path(os.path.realpath(path)), new
    if not path.is_symlink():
        return path, mode
    return (Path(os.path.realpath(path)), mode) if mode & 0o222 else (path, new)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty_folder(folder: Path) -> None:
    """Leave a folder that holds nothing, whatever an earlier run wrote there.

    Raises:
        UserError: something in it cannot be removed.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot empty {folder}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """UTF-8 with ``\\n`` line ends, on every system."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # the name of a file, as Python keeps those that are not UTF-8
        odd = error.object[max(0, error.start - 40) : error.end + 10]
        raise UserError(f"cannot write {path}: {odd!r} is not UTF-8") from error
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write several files: none of them is replaced before the content of all lies on the disk.

    Raises:
        UserError: as :func:`replacing`, or there is a folder where a file is to go.
    """
    if folders := [path for path in contents if path.is_dir()]:
        raise UserError(f"cannot write {folders[0]}: {os.strerror(errno.EISDIR)}")
    with ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(replacing(path)).write_bytes(content)


def read_text(path: Path) -> str:
    """The text of a file, line ends as they are.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: byte {error.start + 1:,} is none of it") from error


def write_json(path: Path, value: Any) -> None:
    """Write :func:`json_text`."""
    write_text(path, json_text(value))


def write_aside(path: Path, value: Any) -> None:
    """Write JSON that is no result; where that cannot be done, a line says so, and nothing fails."""
    try:
        write_json(path, value)
    except UserError as error:
        print(error, file=sys.stderr)


def json_text(value: Any) -> str:
    """Sorted keys, two spaces, and a line end: the same value always gives the same bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """Raises :class:`UserError` where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def value_digest(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """SHA-256 of a JSON value in its canonical form, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
