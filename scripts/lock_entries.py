"""What DVC writes down of a file or folder in ``dvc.lock``: a folder's digest is that of the list of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dvc_entry(root: Path, path: str, texts: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """What DVC writes down of a file or folder; ``texts``: of files that are to have another content."""

    texts = texts or {}

    def content(file: Path) -> bytes:
        name = file.relative_to(root)
        return texts[name].encode() if name in texts else file.read_bytes()

    if not (root / path).is_dir():
        found = content(root / path) if (root / path).exists() else b""
        return {"md5": hashlib.md5(found, usedforsecurity=False).hexdigest(), "size": len(found)}
    files = {file.relative_to(root / path).as_posix(): content(file) for file in _files(root / path)}
    digests = {name: hashlib.md5(found, usedforsecurity=False).hexdigest() for name, found in files.items()}
    listed = json.dumps([{"md5": digests[name], "relpath": name} for name in sorted(files)], sort_keys=True)
    digest = hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest()
    return {"md5": f"{digest}.dir", "size": sum(map(len, files.values())), "nfiles": len(files)}


def _files(folder: Path) -> list[Path]:
    """Those that DVC sees, see ``.dvcignore``."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts and path.suffix != ".pyc"]
