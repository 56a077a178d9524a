"""Records of older formats, as they were committed, become those of the present one; nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_graph import ROOT
from migrated_records import OLD, SETTINGS, Record, lock, old, place

from maskllm4v.receipts.locks import lock_files
from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import FORMAT, read_record
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import file_digest, read_json, value_digest, write_text
from scripts import migrate_records
from scripts.lock_entries import dvc_entry
from scripts.migrate_records import migrate, outdated, relocked, without_defaults


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with four records of format 2, and what DVC wrote down of them."""
    (tmp_path / "reports").mkdir()
    for row in SETTINGS:
        place(old(row), tmp_path)
    (tmp_path / "dvc.lock").write_text(lock(tmp_path))
    return tmp_path


# From format 2 to 3


@pytest.mark.parametrize("path", OLD, ids=[path.stem for path in OLD])
def test_settings_lose_their_defaults(path: Path) -> None:
    record = read_json(path)
    assert without_defaults(record) == {**record, "settings": SETTINGS[record["row"]]}


def test_all_old_records_are_tried() -> None:
    assert {path.stem for path in OLD} == set(SETTINGS)
    assert {read_json(path)["format"] for path in OLD} == {2}


@pytest.mark.parametrize(
    ("row", "change", "found"),
    [
        ("digits-magnitude-sgpt", ("update", "damping", 0.1), {"damping": 0.1}),  # not the default of SparseGPT's
        ("digits-magnitude-sgpt", ("update", "batch_size", 64), {"batch_size": 64}),
        ("digits-magnitude-sgpt", ("prior", "permutation", "greedy"), {"permutation": "greedy"}),
        ("digits-hybrid-long", ("learning", "gate", "positions"), {"gate": "positions"}),
        ("dit-maskllm", ("evaluation", "steps", 250), {}),
        ("dit-maskllm", ("learning", "distillation", 0.0), {}),
    ],
)
def test_what_differs_stays(row: str, change: tuple[str, str, Any], found: Record) -> None:
    record, (section, key, value) = old(row), change
    record["settings"][section][key] = value
    settings = without_defaults(record)["settings"][section]
    assert settings == {k: v for k, v in SETTINGS[row][section].items() if k != key} | found


def test_judge_at_its_defaults() -> None:
    record = old("dit-maskllm")
    assert (
        migrate_records.DEFAULTS["task classification"].keys() | {"name"}
        == record["settings"]["task"]["judge"]["task"].keys()
    )
    record["settings"]["task"]["judge"]["task"] |= migrate_records.DEFAULTS["task classification"]
    assert without_defaults(record)["settings"]["task"]["judge"].keys() == {"model", "training"}


# All records


def test_everything_else_stays(root: Path) -> None:
    files = {path: file_digest(path) for path in root.rglob("*") if path.is_file()}
    assert len(migrate(root)) == len(SETTINGS)
    changed = {path.name for path, digest in files.items() if file_digest(path) != digest}
    assert changed == {"record.json", "dvc.lock"}
    assert {path for path in root.rglob("*") if path.is_file()} == files.keys()
    for row in SETTINGS:
        before = old(row)
        found = read_record(record_file(before["table"], row, root / "reports"))
        assert found["format"] == FORMAT
        assert found["metrics"] == before["metrics"]
        assert found["settings_digest"] == value_digest(found["settings"]) != before["settings_digest"]
        form = {"format", "settings", "settings_digest", "digest"}
        assert {k: v for k, v in found.items() if k not in form} == {k: v for k, v in before.items() if k not in form}


def test_a_second_time_changes_nothing(root: Path) -> None:
    migrate(root)
    files = {path: (file_digest(path), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}
    assert migrate(root) == []
    assert {p: (file_digest(p), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()} == files


def spoilt(key: str, value: Any) -> Record:
    record = old()
    record[key] = value
    return record


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (spoilt("settings", {}), "settings and their digest disagree; the record was edited"),
        (spoilt("format", 1), f"has format 1, from which no way leads to {FORMAT}"),
        (spoilt("format", FORMAT + 1), f"has format {FORMAT + 1}, from which no way leads to {FORMAT}"),
        (spoilt("format", "2"), f"has format 2, from which no way leads to {FORMAT}"),
        ({"row": "digits-hybrid-long", "table": "digits"}, "is not a record"),
    ],
)
def test_if_one_cannot_be_migrated_none_is(record: Record, said: str, root: Path) -> None:
    place(record, root)
    files = {path: file_digest(path) for path in root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=re.escape(said)):
        migrate(root)
    assert {path: file_digest(path) for path in root.rglob("*") if path.is_file()} == files


def test_later_formats_take_a_step_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_old_default(record: Record) -> Record:
        """A default that changed: what was meant then is written down."""
        settings = record["settings"]
        return {**record, "settings": {**settings, "dense": {"weight_decay": 0.05, **settings["dense"]}}}

    migrate(root)
    place(old(), root)  # one that comes from another branch
    monkeypatch.setattr(migrate_records, "FORMAT", FORMAT + 1)
    monkeypatch.setitem(migrate_records.STEPS, FORMAT, with_old_default)
    assert len(migrate(root)) == len(SETTINGS)
    for row, decay in (("digits-hybrid-long", 0.05), ("dit-maskllm", 0.0)):
        found = read_json(record_file(old(row)["table"], row, root / "reports"))
        assert (found["format"], found["settings"]["dense"]["weight_decay"]) == (FORMAT + 1, decay)
        assert found["settings_digest"] == value_digest(found["settings"])


def test_a_step_must_not_touch_what_was_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(migrate_records.STEPS, 2, lambda record: {**record, "metrics": {}})
    with pytest.raises(AssertionError):
        migrate(root)
    assert all(read_json(path)["format"] == 2 for path in root.rglob("record.json"))


# dvc.lock


def test_lock_says_what_lies_there_afterwards(root: Path) -> None:
    before = (root / "dvc.lock").read_text()
    assert "path: \n        reports/cifar10/" in before
    migrate(root)
    after = (root / "dvc.lock").read_text()
    assert after == lock(root) != before
    changed = [new for old, new in zip(before.split("\n"), after.split("\n"), strict=True) if old != new]
    assert {line.split(":")[0].strip() for line in changed} == {"md5", "size"}
    assert len(changed) == 2 * (len(SETTINGS) + 1)


def test_an_entry_that_was_wrong_before_stays(root: Path) -> None:
    (root / "reports/digits/runs/digits-hybrid-long/evaluation/layers.csv").write_text("other\n")
    before = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    migrate(root)
    after = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    assert {stage for stage in before if before[stage] == after[stage]} == {"evaluate@digits-hybrid-long", "report"}


def test_what_was_interrupted_is_finished(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = write_text, 0

    def dying(path: Path, text: str) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(migrate_records, "write_text", dying)
    with pytest.raises(KeyboardInterrupt):
        migrate(root)
    monkeypatch.undo()
    assert len(migrate(root)) == len(SETTINGS) - 1
    assert (root / "dvc.lock").read_text() == lock(root)


def test_without_a_lock(root: Path) -> None:
    (root / "dvc.lock").unlink()
    assert len(migrate(root)) == len(SETTINGS)
    assert not (root / "dvc.lock").exists()


def test_entries_are_those_that_dvc_writes() -> None:
    found = [
        out
        for path in lock_files(ROOT)
        for name, stage in yaml.load(path.read_text(), yaml.CSafeLoader)["stages"].items()
        for out in stage.get("outs", [])
        if name.startswith("evaluate@")
    ]
    assert len(found) > 50
    for out in found:
        assert out == {"path": out["path"], "hash": "md5", **dvc_entry(ROOT, out["path"], {})}


# What is committed


def test_committed_records_are_of_the_present_format() -> None:
    assert outdated(ROOT) == {}
    assert relocked(ROOT, "text", {}) == "text"


def test_command_line(root: Path) -> None:
    def called(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scripts.migrate_records", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})

    row = "reports/digits/runs/digits-hybrid-long/evaluation/record.json"
    found = called("--check")
    assert (found.returncode, found.stderr) == (1, "")
    assert row in found.stdout.splitlines()
    assert found.stdout.endswith(f"\n4 records are not of format {FORMAT}\n")
    assert read_json(root / row)["format"] == 2
    found = called()
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.endswith(f"\n4 records were brought to format {FORMAT}\n")
    assert called("--check").stdout == f"0 records are not of format {FORMAT}\n"
    shutil.copy(OLD[0], root / row)
    (root / row).write_text(json.dumps({**read_json(OLD[0]), "settings": {}}))
    found = called()
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"migrate_records: {row}: settings and their digest disagree")
