"""``scripts/relock.py``: today's code in what is locked of each table, as DVC would write it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_graph import ROOT

from maskllm4v.receipts.locks import RENDERING, lock_files
from maskllm4v.utils.errors import UserError
from scripts.lock_entries import dvc_entry
from scripts.relock import edited_documents, relock


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The code, documents and the lock file, in a repository of its own; the records are the project's."""
    for name in ("maskllm4v", "stages", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", ".gitignore", "README.md", "docs/findings.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "reports").mkdir()
    for path in (ROOT / "reports").iterdir():
        if not path.is_dir() or path.name in ("benchmarks", "receipts", "proofs"):
            (tmp_path / "reports" / path.name).symlink_to(path)
            continue
        (tmp_path / "reports" / path.name).mkdir()
        for inner in path.iterdir():  # what is locked is written anew
            here = tmp_path / "reports" / path.name / inner.name
            shutil.copy(inner, here) if inner.suffix == ".lock" else here.symlink_to(inner)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def texts(root: Path) -> dict[str, str]:
    """The lock files by path."""
    return {path.relative_to(root).as_posix(): path.read_text() for path in lock_files(root)}


def locked(root: Path) -> dict[str, Any]:
    """The stages of all tables, by name and by file if they are not those of the active one."""
    found: dict[str, Any] = {}
    for path, text in texts(root).items():
        stages = yaml.load(text, yaml.CSafeLoader)["stages"]
        found |= stages if path == "dvc.lock" else {f"{name} {path}": stage for name, stage in stages.items()}
    return found


def test_the_committed_lock_names_the_committed_code(root: Path) -> None:
    """DVC wrote it down when the exact tables were made last."""
    before = texts(root)
    assert len(before) > 3
    assert relock(root) == []
    assert texts(root) == before


def test_the_committed_lock_names_the_committed_results() -> None:
    """Whoever renders tables without DVC has to run it afterwards: a clone's ``dvc repro`` would change the lock."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(name) for name in listed.split("\0") if name]
    committed = {path.as_posix() for file in files for path in (file, *file.parents)}
    stale = {
        f"{name} {part} {entry['path']}"
        for name, stage in locked(ROOT).items()
        for part in ("deps", "outs")
        for entry in stage.get(part, [])
        if entry["path"] in committed and dvc_entry(ROOT, entry["path"])["md5"] != entry["md5"]
    }
    assert not stale, "run dvc repro"


def test_an_edit_is_written_down_where_it_is_a_dependency(root: Path) -> None:
    before = locked(root)
    path = root / "maskllm4v/oneshot/prune.py"
    path.write_text(path.read_text() + "# an edit\n")
    changed = relock(root)
    assert {name.partition("@")[0] for name in changed} == {"prior", "update"}
    after = locked(root)
    assert list(after) == list(before)
    for name, stage in after.items():
        moved = [
            (old["path"], new["path"])
            for old, new in zip(before[name]["deps"], stage["deps"], strict=True)
            if old != new
        ]
        assert moved == ([("maskllm4v/oneshot",) * 2] if name.partition(" ")[0] in changed else [])
        assert {key: stage[key] for key in stage if key != "deps"} == {
            key: before[name][key] for key in before[name] if key != "deps"
        }
    assert relock(root) == []
    path.write_bytes((ROOT / "maskllm4v/oneshot/prune.py").read_bytes())
    assert set(relock(root)) == set(changed)
    assert texts(root) == texts(ROOT)


def test_one_table_alone(root: Path) -> None:
    path = root / "maskllm4v/utils/errors.py"
    path.write_text(path.read_text() + "# an edit\n")
    changed = relock(root, ["cifar10"])
    assert changed
    assert all("@cifar10" in name for name in changed)
    assert {name.partition("@")[0] for name in relock(root)} > set(RENDERING)


def test_a_dependency_that_moved(root: Path) -> None:
    """Entries are sorted by path, and one that is declared twice stays twice."""
    text = (root / "dvc.yaml").read_text()
    (root / "maskllm4v/oneshot").rename(root / "maskllm4v/zero")
    (root / "dvc.yaml").write_text(text.replace("maskllm4v/oneshot", "maskllm4v/zero"))
    before, _ = locked(root), relock(root)
    for name, stage in locked(root).items():
        paths = [dep["path"] for dep in stage["deps"]]
        assert paths == sorted(paths)
        wanted = [dep["path"].replace("maskllm4v/oneshot", "maskllm4v/zero") for dep in before[name]["deps"]]
        assert paths == sorted(wanted)


@pytest.mark.parametrize("name", ["README.md", "docs/findings.md"])
def test_prose_is_written_down(root: Path, name: str) -> None:
    before, path = locked(root), root / name
    path.write_text(f"{path.read_text()}\nOne more sentence.\n")
    assert edited_documents(root) == [name]
    assert relock(root, ["digits"]) == []
    assert relock(root) == ["documents"]
    assert edited_documents(root) == []
    after = locked(root)
    (old,), (new,) = ([out for out in found["documents"]["outs"] if out["path"] == name] for found in (before, after))
    assert new["size"] - old["size"] == len("\nOne more sentence.\n")
    old |= new
    assert after == before


def test_an_edited_block_is_left_to_dvc(root: Path) -> None:
    """Or the lock would call it what the stage wrote."""
    before, path = texts(root), root / "README.md"
    path.write_text(path.read_text().replace("\n<!-- /digits -->", "\nOne more line.\n<!-- /digits -->"))
    with pytest.raises(UserError, match=r"README\.md: not what the records give; run dvc repro"):
        relock(root)
    assert texts(root) == before
    relock(root, ["digits"])


def test_an_unknown_table_is_an_error(root: Path) -> None:
    with pytest.raises(UserError, match="no table 'mnist'; allowed: ade20k_eomt_l, "):
        relock(root, ["mnist"])
