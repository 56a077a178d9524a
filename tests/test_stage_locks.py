"""What DVC has locked, table by table: whichever is active, nothing of any table is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from import_graph import ROOT

from maskllm4v.receipts import locks
from maskllm4v.receipts.locks import RENDERING, activate, lock_files, lock_text, locked_stages, stage_texts, stages_file
from maskllm4v.utils import io

TABLES = ("digits", "digits_patterns", "dit_digits", "imagenet_vit_b16")  # the last one has never run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """All that is locked in this repository, and a few experiments."""
    (tmp_path / "experiments").mkdir()
    for name in ("dvc.lock", "params.yaml", *(f"experiments/{table}.yaml" for table in TABLES)):
        shutil.copy(ROOT / name, tmp_path / name)
    for path in lock_files(ROOT)[:-1]:
        here = tmp_path / path.relative_to(ROOT)
        here.parent.mkdir(parents=True)
        shutil.copy(path, here)
    return tmp_path


def use(root: Path, table: str) -> None:
    activate(root, root / f"experiments/{table}.yaml")


def state(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def stages(root: Path) -> dict[str, dict[str, object]]:
    return locked_stages(path.read_bytes() for path in lock_files(root))


def test_pieces_make_up_the_file() -> None:
    for path in lock_files(ROOT):
        assert lock_text(stage_texts(path.read_text())) == path.read_text()


def test_the_committed_files_hold_a_table_each() -> None:
    """``use`` would move what stands elsewhere, and a clone's ``make repro`` would be the slower for it."""
    assert stage_texts((ROOT / "dvc.lock").read_text()).keys() > RENDERING
    for path in lock_files(ROOT)[:-1]:
        assert not stage_texts(path.read_text()).keys() & RENDERING
    assert not (ROOT / stages_file("digits")).exists()


def test_there_and_back_changes_no_byte(root: Path) -> None:
    before, everything = state(root), stages(root)
    for table in ("digits_patterns", "dit_digits", "imagenet_vit_b16", "digits_patterns"):
        use(root, table)
        assert (root / "params.yaml").read_bytes() == (root / f"experiments/{table}.yaml").read_bytes()
        assert not (root / stages_file(table)).exists()
        assert stages(root) == everything
        if table != "imagenet_vit_b16":
            assert stage_texts((root / "dvc.lock").read_text()).keys() == (
                stage_texts(before[stages_file(table)].decode()).keys() | RENDERING
            )
    use(root, "digits")
    assert state(root) == before


def test_what_ran_meanwhile_goes_along(root: Path) -> None:
    """A stage that ran again, one that prepares the data of two tables among them, and one that nobody knows."""
    use(root, "digits_patterns")
    text = (root / "dvc.lock").read_text()
    for stage in ("prepare@digits", "dense@digits-patterns-dense"):
        text = text.replace(f"  {stage}:\n    cmd: python", f"  {stage}:\n    cmd: python3")
    (root / "dvc.lock").write_text(text + "  evaluate@a-row-that-is-gone:\n    cmd: true\n")
    changed = stages(root)
    assert str(changed["prepare@digits"]["cmd"]).startswith("python3")
    use(root, "digits")
    assert stages(root) == changed
    patterns = locked_stages([(root / stages_file("digits_patterns")).read_text()])
    assert patterns["prepare@digits"] == changed["prepare@digits"]
    assert patterns["dense@digits-patterns-dense"] == changed["dense@digits-patterns-dense"]
    assert "evaluate@a-row-that-is-gone" in stage_texts((root / "dvc.lock").read_text())


def test_one_file_for_all_tables_is_taken_apart(root: Path) -> None:
    before = state(root)
    known = [path for path in lock_files(root) if path.parent.name in TABLES]
    everything = {
        name: text for path in [*known, root / "dvc.lock"] for name, text in stage_texts(path.read_text()).items()
    }
    for path in known:
        path.unlink()
    digits = stage_texts(before["dvc.lock"].decode())
    (root / "dvc.lock").write_text(lock_text(digits | everything))
    use(root, "digits")
    assert state(root) == before


@pytest.mark.parametrize("calls", range(4))
def test_an_interrupted_exchange_is_completed(root: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    everything = stages(root)
    done: list[Path] = []

    def dies(write: Callable[..., None]) -> Callable[..., None]:
        def wrapper(path: Path, text: str) -> None:
            if len(done) == calls:
                raise KeyboardInterrupt
            done.append(path)
            write(path, text)

        return wrapper

    monkeypatch.setattr(locks, "write_text", dies(io.write_text))
    try:
        use(root, "dit_digits")
    except KeyboardInterrupt:
        assert len(done) < 3
    monkeypatch.undo()
    assert stages(root) == everything
    use(root, "dit_digits")
    finished = state(root)
    assert stages(root) == everything
    use(root, "digits")
    use(root, "dit_digits")
    assert state(root) == finished


def test_nothing_was_ever_run(root: Path) -> None:
    for path in lock_files(root):
        path.unlink()
    use(root, "dit_digits")
    assert not lock_files(root)
    assert (root / "params.yaml").read_bytes() == (root / "experiments/dit_digits.yaml").read_bytes()
