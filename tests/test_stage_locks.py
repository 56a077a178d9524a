"""What DVC has locked, table by table: whichever is active, nothing of any table is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from import_graph import ROOT

from maskllm4v.config import load_experiment
from maskllm4v.receipts import locks
from maskllm4v.receipts.locks import RENDERING, activate, lock_files, lock_text, locked_stages, stage_texts, stages_file
from maskllm4v.utils import io

LOST = "evaluate@a-row-that-is-gone"
TABLES = ("digits", "digits_patterns", "dit_digits", "imagenet_vit_b16")  # the last one has never run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A few experiments, and what this repository has locked of them."""
    (tmp_path / "experiments").mkdir()
    for name in ("dvc.lock", "params.yaml", *(f"experiments/{table}.yaml" for table in TABLES)):
        shutil.copy(ROOT / name, tmp_path / name)
    add_lock(tmp_path, "digits_patterns")
    add_lock(tmp_path, "dit_digits")
    return tmp_path


def add_lock(root: Path, table: str) -> None:
    (root / stages_file(table)).parent.mkdir(parents=True)
    shutil.copy(ROOT / stages_file(table), root / stages_file(table))


def use(root: Path, table: str) -> None:
    activate(root, root / f"experiments/{table}.yaml")


def state(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def stages(root: Path) -> dict[str, dict[str, dict[str, object]]]:
    """By table; those that are no table's under no name."""
    active = load_experiment(root / "params.yaml").table
    found: dict[str, dict[str, dict[str, object]]] = {"": {}}
    for path in lock_files(root):
        table = active if path.name == "dvc.lock" else path.parent.name
        for name, stage in locked_stages(path.read_bytes()).items():
            found.setdefault("" if name in (*RENDERING, LOST) else table, {})[name] = stage
    return found


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
    before = stages(root)
    use(root, "digits_patterns")
    text = (root / "dvc.lock").read_text()
    for stage in ("prepare@digits", "dense@digits-patterns-dense"):
        assert f"  {stage}:\n    cmd: python " in text
        text = text.replace(f"  {stage}:\n    cmd: python ", f"  {stage}:\n    cmd: python3 ")
    (root / "dvc.lock").write_text(f"{text}  {LOST}:\n    cmd: true\n")
    changed = stages(root)
    use(root, "digits")
    assert stages(root) == changed
    assert changed["digits"] == before["digits"]
    assert str(changed["digits_patterns"]["prepare@digits"]["cmd"]).startswith("python3 ")
    assert LOST in stage_texts((root / "dvc.lock").read_text())


def test_data_of_two_tasks_are_prepared_for_each(root: Path) -> None:
    """Their settings are dependencies: if one's stage counted for both, each switch would run it again."""
    names = ("digits_detection", "digits_segmentation")
    for name in names:
        shutil.copy(ROOT / f"experiments/{name}.yaml", root / "experiments")
        add_lock(root, name)
    before = stages(root)
    entries = [before[name]["prepare@digit_scenes"] for name in names]
    assert entries[0] != entries[1]
    for name in (*names, *names, "digits"):
        use(root, name)
        assert stages(root) == before


def test_a_new_table_takes_prepared_data_along(root: Path) -> None:
    everything = stages(root)
    (root / stages_file("digits_patterns")).unlink()
    use(root, "digits_patterns")
    assert stages(root)["digits_patterns"] == {"prepare@digits": everything["digits"]["prepare@digits"]}
    assert stages(root)["digits"] == everything["digits"]


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
    left = [stage for path in lock_files(root) for stage in locked_stages(path.read_bytes()).items()]
    assert all(stage in left for table in everything.values() for stage in table.items())
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
