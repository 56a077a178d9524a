"""Bring the code and the prose that ``dvc.lock`` and its like name up to date, without running a stage.

    python -m scripts.relock cifar10            the stages of one table
    python -m scripts.relock                    all tables, and the rendering stages of the active one

A recording (``exact: false``) took hours on a machine whose artifacts nobody else has, so that neither ``dvc repro``
nor ``dvc commit`` can lock it again where code was only moved or renamed. This writes down the dependencies that
``dvc.yaml`` declares now, with the digests of the working tree; commands, data, settings and outputs stay as they are.
It is for changes that alter no output of any stage, exported files included, and proves nothing: for exact tables
``make proof`` has to agree afterwards.

README and findings are outputs that people write: after an edit of their prose, or with another file in
``reports/benchmarks``, the second form writes down the new digests, if generated blocks are what the records give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from maskllm4v.config import PARAMS, load_experiment
from maskllm4v.receipts.locks import LOCK, lock_text, locked_stages, stage_texts, stages_file
from maskllm4v.reporting.report import check_documents
from maskllm4v.runs.paths import REPORTS
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import write_text
from scripts.lock_entries import dvc_entry
from scripts.proof_records import declared_stages, path_of

CODE = ("maskllm4v/", "stages/")
BENCHMARKS = str(REPORTS / "benchmarks")  # files that people add, and that documents show
DOCUMENTS = "documents"  # the stage whose outputs people edit, too
_PATH = re.compile(r"    - path: *(.*)")


def relock(root: Path, tables: Collection[str] = ()) -> list[str]:
    """Rewrite what is locked (:mod:`maskllm4v.receipts.locks`); returns the stages that changed.

    Args:
        root: of the repository.
        tables: whose stages; none: all tables' and the rendering stages.

    Raises:
        UserError: no such table, a dependency without files, or a document whose generated blocks were edited.
    """
    files = {load_experiment(path).table: path for path in sorted((root / "experiments").glob("*.yaml"))}
    if unknown := [table for table in tables if table not in files]:
        raise UserError(f"no table {unknown[0]!r}; allowed: {', '.join(files)}")
    if not tables and (edited_documents(root) or _is_stale(root, DOCUMENTS, "deps", BENCHMARKS)):
        check_documents(root)
    active = load_experiment(root / PARAMS).table
    changed: dict[str, None] = {}  # what prepares data is in several files
    entry = cache(partial(_entry, root))  # many stages share a folder
    for table in tables or {**files, active: None}:
        path = root / LOCK if table == active else root / stages_file(table)
        before = stage_texts(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not before:
            continue
        file = root / PARAMS if table == active else files[table]
        declared = declared_stages(root, file, rendering=table == active and not tables)
        after = {name: _renewed(name, text, declared.get(name), entry) for name, text in before.items()}
        if after != before:
            changed |= {name: None for name in after if after[name] != before[name]}
            write_text(path, lock_text(after))
    return list(changed)


def edited_documents(root: Path) -> list[str]:
    """README, findings and the list of tables, as far as they are not those of ``dvc.lock``."""
    outs = _locked(root, DOCUMENTS).get("outs", [])
    return [out["path"] for out in outs if _is_stale(root, DOCUMENTS, "outs", out["path"])]


def _is_stale(root: Path, stage: str, part: str, path: str) -> bool:
    """Whether a stage read or wrote something else at a path when it was locked."""
    entries = _locked(root, stage).get(part, [])
    return any(entry["path"] == path and dvc_entry(root, path)["md5"] != entry["md5"] for entry in entries)


def _locked(root: Path, stage: str) -> dict[str, Any]:
    return locked_stages((root / LOCK).read_bytes()).get(stage, {})


def _renewed(name: str, block: str, stage: Mapping[str, Any] | None, entry: Callable[[str], str]) -> str:
    """A stage's piece with today's code, and documents if it writes them; other entries and other stages stay."""
    if stage is None:
        return block
    deps = [path_of(dep) for dep in stage.get("deps", [])]
    outs = [path_of(out) for out in stage.get("outs", [])] if name == DOCUMENTS else []
    block = _replaced(block, "deps", lambda path: path.startswith(CODE) or path == BENCHMARKS, deps, entry)
    return _replaced(block, "outs", lambda path: path in outs, outs, entry)


def _replaced(
    block: str, part: str, renews: Callable[[str], bool], declared: Sequence[str], entry: Callable[[str], str]
) -> str:
    """A stage's piece whose ``deps`` or ``outs`` have new entries for some paths, and none that is declared no more."""
    begin, entries, end = _entries(block, part)
    if begin is None:
        return block
    kept = {path: text for path, text in entries.items() if not renews(path)}
    kept |= {path: entry(path) * declared.count(path) for path in declared if renews(path)}  # twice if declared twice
    return begin + "".join(kept[path] for path in sorted(kept)) + end


def _entries(block: str, part: str) -> tuple[str | None, dict[str, str], str]:
    """What comes before a stage's dependencies or outputs, each of them as text by path, and what follows."""
    lines = block.splitlines(keepends=True)
    if f"    {part}:\n" not in lines:
        return None, {}, ""
    first = last = lines.index(f"    {part}:\n") + 1
    entries: dict[str, str] = {}
    path = ""
    while last < len(lines) and lines[last].startswith(("    - ", "      ")):
        if found := _PATH.fullmatch(lines[last].rstrip("\n")):
            path = found[1] or lines[last + 1].strip()  # a long one is on a line of its own
        entries[path] = entries.get(path, "") + lines[last]
        last += 1
    return "".join(lines[:first]), entries, "".join(lines[last:])


def _entry(root: Path, path: str) -> str:
    """A file or folder as DVC writes it down."""
    if not (root / path).exists():
        raise UserError(f"dvc.yaml: {path} is missing")
    facts = "".join(f"      {key}: {value}\n" for key, value in dvc_entry(root, path).items())
    return f"    - path: {path}\n      hash: md5\n{facts}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.relock", description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", help="default: all")
    try:
        changed = relock(Path(), parser.parse_args().tables)
    except UserError as error:
        sys.exit(f"relock: {error}")
    print("\n".join(changed) or "dvc.lock is up to date")


if __name__ == "__main__":
    main()
