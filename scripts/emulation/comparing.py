"""Where two folders differ: file by file, and inside of safetensors tensor by tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskllm4v.utils.io import file_digest, value_digest

ASIDE = ".cache"  # timings and resumable states: no results
FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}
SHOWN = 60  # characters of a line of text


@dataclass(frozen=True)
class Difference:
    """One file that is not the same.

    Attributes:
        path: relative to the folders.
        where: the first place, with what each side has there.
    """

    path: str
    where: str

    def __str__(self) -> str:
        return f"{self.path}: {self.where}"


def written(folder: Path) -> dict[str, Path]:
    """All files of a folder by relative path, without those that are no results."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in found.items() if name.parts[0] != ASIDE}


def digest(folder: Path, paths: Iterable[str]) -> str:
    """SHA-256, in hex, of some files and folders in a folder, names and content."""
    found = {name: file_digest(path) for name, path in written(folder).items()}
    return value_digest(
        {name: value for name, value in found.items() if any(Path(name).is_relative_to(p) for p in paths)}
    )


def differences(native: Path, other: Path) -> list[Difference]:
    """The files that are not equal byte for byte, or that only one of two folders has."""
    one, two, found = written(native), written(other), list[Difference]()
    for name in sorted(one.keys() | two.keys()):
        if name not in two:
            found.append(Difference(name, "written natively only"))
        elif name not in one:
            found.append(Difference(name, "not written natively"))
        elif (a := one[name].read_bytes()) != (b := two[name].read_bytes()):
            found.append(Difference(name, _where(name, a, b)))
    return found


def _where(name: str, a: bytes, b: bytes) -> str:
    if name.endswith(".safetensors"):
        try:
            return _tensor(a, b)
        except (ValueError, KeyError, struct.error):  # damaged: compared as any other file
            pass
    elif b"\0" not in a + b:
        return _line(a, b)
    return f"byte {_first(a, b):,} of {len(a):,}" + ("" if len(a) == len(b) else f"; {len(b):,} there")


def _first(a: bytes, b: bytes) -> int:
    """Position of the first byte that differs, or of the shorter one's end."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _line(a: bytes, b: bytes) -> str:
    one, two = (text.decode(errors="replace").splitlines() for text in (a, b))
    for number, (x, y) in enumerate(zip(one, two, strict=False), 1):
        if x != y:
            start = max(0, _first(x.encode(), y.encode()) - SHOWN // 2)
            return f"line {number}: {x.strip()[start:][:SHOWN]!r} natively, {y.strip()[start:][:SHOWN]!r} there"
    return f"{len(one)} lines natively, {len(two)} there"


def _tensor(a: bytes, b: bytes) -> str:
    one, two = _tensors(a), _tensors(b)
    if (names := {name: (t["dtype"], t["shape"]) for name, (t, _) in one.items()}) != {
        name: (t["dtype"], t["shape"]) for name, (t, _) in two.items()
    }:
        return f"other tensors: {', '.join(sorted(set(names) ^ set(two))) or 'of other types or shapes'}"
    differing = [name for name in one if one[name][1] != two[name][1]]
    if not differing:
        return "the tensors are equal, what the file says of itself is not"
    (about, x), (_, y) = one[differing[0]], two[differing[0]]
    count = math.prod(about["shape"])
    size = len(x) // count
    places = [i for i in range(count) if x[i * size : (i + 1) * size] != y[i * size : (i + 1) * size]]
    here, there = (_value(about["dtype"], data[places[0] * size :][:size]) for data in (x, y))
    return (
        f"tensor {differing[0]!r} at {_index(places[0], about['shape'])}: {here} natively, {there} there; "
        f"{len(places)} of its {count} values differ, {len(differing)} of {len(one)} tensors"
    )


def _tensors(data: bytes) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Each tensor's entry in the header, and its bytes, in the order of the file."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    content, found = data[8 + length :], dict[str, tuple[dict[str, Any], bytes]]()
    for name, about in _by_offset(header):
        begin, end = about["data_offsets"]
        found[name] = (about, content[begin:end])
    return found


def _by_offset(header: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    tensors = ((name, about) for name, about in header.items() if name != "__metadata__")
    yield from sorted(tensors, key=lambda entry: entry[1]["data_offsets"])


def _value(dtype: str, data: bytes) -> str:
    return repr(struct.unpack(f"<{FORMATS[dtype]}", data)[0]) if dtype in FORMATS else data.hex()


def _index(position: int, shape: list[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        position, last = divmod(position, size)
        index.append(last)
    return index[::-1]
