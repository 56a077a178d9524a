"""``scripts/relock.py``: today's code in ``dvc.lock``, as DVC itself would write it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_graph import ROOT

from maskllm4v.utils.errors import UserError
from scripts.relock import relock

RENDERING = {"report", "track"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The code and the lock file, in a repository of its own."""
    for name in ("maskllm4v", "stages", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def locked(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((root / "dvc.lock").read_text(), yaml.CSafeLoader)["stages"]
    return found


def test_the_committed_lock_names_the_committed_code(root: Path) -> None:
    """DVC wrote it down when the exact tables were made last."""
    before = (root / "dvc.lock").read_bytes()
    assert relock(root) == []
    assert (root / "dvc.lock").read_bytes() == before


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
        assert moved == ([("maskllm4v/oneshot",) * 2] if name in changed else [])
        assert {key: stage[key] for key in stage if key != "deps"} == {
            key: before[name][key] for key in before[name] if key != "deps"
        }
    assert relock(root) == []
    path.write_bytes((ROOT / "maskllm4v/oneshot/prune.py").read_bytes())
    assert set(relock(root)) == set(changed)
    assert (root / "dvc.lock").read_bytes() == (ROOT / "dvc.lock").read_bytes()


def test_one_table_alone(root: Path) -> None:
    path = root / "maskllm4v/utils/errors.py"
    path.write_text(path.read_text() + "# an edit\n")
    changed = relock(root, ["cifar10"])
    assert changed
    assert all("@cifar10" in name for name in changed)
    assert {name.partition("@")[0] for name in relock(root)} > RENDERING


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


def test_an_unknown_table_is_an_error(root: Path) -> None:
    with pytest.raises(UserError, match="no table 'mnist'; allowed: cifar10, digits"):
        relock(root, ["mnist"])
