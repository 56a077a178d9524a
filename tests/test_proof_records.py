"""When the proof of a table still stands, and when it has to be run again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from import_graph import ROOT

from maskllm4v.receipts.locks import lock_files, lock_text, stage_texts
from maskllm4v.utils.errors import UserError
from scripts.proof_records import PARTS, current_state, exact_tables, record_file, why_stale, write_record

DIGITS, ALL = {"digits", "digits_patterns"}, {"digits", "digits_patterns", "dit_digits"}
NAMES = (
    *("maskllm4v", "stages", "params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock", ".gitignore"),
    *(f"experiments/{table}.yaml" for table in (*ALL, "cifar10")),
    *(f"reports/{table}/stages.lock" for table in ("digits_patterns", "dit_digits", "cifar10")),
    *("reports/digits/table.md", "reports/digits/runs/digits-ria", "reports/dit_digits/runs/dit-wanda"),
)
DIGITS_FILE = "experiments/digits.yaml"
States = dict[str, dict[str, str]]
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What proofs depend on, outputs of two rows only, in a git repository; nothing of it is committed yet."""
    folder = tmp_path_factory.mktemp("project")
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture
def root(project: Path, tmp_path: Path) -> Path:
    """A copy of the project that a test may change."""
    return shutil.copytree(project, tmp_path / "root")


def states(root: Path) -> States:
    return {table: current_state(root, file) for table, file in exact_tables(root).items()}


@pytest.fixture(scope="module")
def before(project: Path) -> States:
    return states(project)


def replaced(path: str, old: str, new: str) -> Edit:
    def edit(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text, f"{path} does not hold {old!r} any more"
        (root / path).write_text(text.replace(old, new, 1))

    return edit


def appended(path: str, text: str = "# more\n") -> Edit:
    def edit(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with (root / path).open("a") as file:
            file.write(text)

    return edit


def removed(path: str) -> Edit:
    return lambda root: (root / path).unlink()


def locked(stage: str, old: str, new: str) -> Edit:
    """Another value in what is locked of one stage."""

    def edit(root: Path) -> None:
        (path,) = (path for path in lock_files(root) if stage in stage_texts(path.read_text()))
        stages = stage_texts(path.read_text())
        assert old in stages[stage]
        path.write_text(lock_text(stages | {stage: stages[stage].replace(old, new, 1)}))

    return edit


RECORD = "reports/dit_digits/runs/dit-wanda/evaluation/record.json"
LEARNED = "digits-maskllm-short-magnitude: {prior: digits-magnitude, steps: 200}"
CHANGES: dict[str, tuple[Edit, str, set[str]]] = {
    "a module of every stage": (appended("maskllm4v/utils/errors.py"), "code", ALL),
    "the script of a stage that a table lacks": (appended("stages/update.py"), "code", DIGITS),
    "a task": (appended("maskllm4v/tasks/diffusion/noising.py"), "code", {"dit_digits"}),
    "the script of a stage": (appended("stages/evaluate.py"), "code", ALL),
    "a new file in a declared folder": (appended("maskllm4v/config/more.py"), "code", ALL),
    "a removed file": (removed("maskllm4v/sparsity/gumbel/triton_op.py"), "code", ALL),
    "a new dependency": (
        replaced("dvc.yaml", "stages/update.py\n", "stages/update.py\n        - requirements.lock\n"),
        "code",
        DIGITS,
    ),
    "a stage's command": (replaced("dvc.yaml", "stages.export ${key}", "stages.export ${key} -v"), "code", ALL),
    "a stage's settings": (replaced("dvc.yaml", "- params.yaml: *common\n", "- runtime\n"), "code", ALL),
    "the order of a stage's settings": (
        replaced(
            "dvc.yaml", "- params.yaml: *common\n        - pattern\n", "- pattern\n        - params.yaml: *common\n"
        ),
        "",
        set(),
    ),
    "a stage's description": (replaced("dvc.yaml", "One-shot pruning", "Pruning in one shot"), "", set()),
    "bytecode": (appended("maskllm4v/__pycache__/errors.cpython-311.pyc"), "", set()),
    "reports": (appended("maskllm4v/reporting/tables.py"), "", set()),
    "the report stage": (appended("stages/report.py"), "", set()),
    "MLflow": (appended("maskllm4v/tracking/runs.py"), "", set()),
    "commands": (appended("maskllm4v/cli/prune.py"), "", set()),
    "a setting": (replaced(DIGITS_FILE, "steps: 1000", "steps: 999"), "settings", {"digits"}),
    "a row's setting": (replaced(DIGITS_FILE, LEARNED, LEARNED[:-1] + "0}"), "settings", {"digits"}),
    "how it runs": (replaced(DIGITS_FILE, "loader_workers: 0", "loader_workers: 2"), "", set()),
    "a comment": (appended("experiments/dit_digits.yaml"), "", set()),
    "a title": (replaced(DIGITS_FILE, "title: Vision", "title: A vision"), "", set()),
    "a row's name": (replaced(DIGITS_FILE, "digits-ria: RIA", "digits-ria: RIA's"), "", set()),
    "an experiment that is not exact": (
        replaced("experiments/cifar10.yaml", "label_smoothing: 0.1", "label_smoothing: 0.2"),
        "",
        set(),
    ),
    "packages": (appended("requirements.lock"), "packages", ALL),
    "a record": (appended(RECORD), "outputs", {"dit_digits"}),
    "a new file beside a record": (appended("reports/digits/runs/digits-ria/more.csv"), "outputs", {"digits"}),
    "a rendered table": (appended("reports/digits/table.md"), "", set()),
    "tensors": (
        locked("train@digits-patterns-2of8-maskllm", "artifacts/digits-patterns-2of8-maskllm\n      hash: md5", "x"),
        "outputs",
        {"digits_patterns"},
    ),
    "what a rendering stage read": (locked("report", "hash: md5", "hash: sha256"), "", set()),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_change_makes_the_tables_stale_that_use_it(kind: str, root: Path, before: States) -> None:
    edit, part, tables = CHANGES[kind]
    edit(root)
    after = states(root)
    changed = {table: [key for key in PARTS if after[table][key] != before[table][key]] for table in before}
    assert changed == {table: [part] if table in tables else [] for table in before}


def test_tables_are_the_exact_ones_and_the_active_one_is_last(root: Path) -> None:
    assert list(exact_tables(root)) == ["digits_patterns", "dit_digits", "digits"]
    shutil.copy(root / "experiments/dit_digits.yaml", root / "params.yaml")
    assert list(exact_tables(root)) == ["digits", "digits_patterns", "dit_digits"]
    replaced("experiments/digits_patterns.yaml", "exact: true", "exact: false")(root)
    assert exact_tables(root) == {name: root / f"experiments/{name}.yaml" for name in ("digits", "dit_digits")}


def test_broken_dvc_file_is_named(root: Path) -> None:
    replaced("dvc.yaml", "${task.name}", "${task.nome}")(root)
    with pytest.raises(UserError, match=r"dvc\.yaml with experiments/digits\.yaml: .*task\.nome"):
        current_state(root, root / DIGITS_FILE)


# Records


def test_record_stands_until_something_changes(root: Path) -> None:
    assert why_stale(root, root / DIGITS_FILE) == "reports/proofs/digits.json is missing"
    write_record(root, "digits", current_state(root, root / DIGITS_FILE))
    assert why_stale(root, root / DIGITS_FILE) is None
    appended("maskllm4v/utils/errors.py")(root)
    assert why_stale(root, root / DIGITS_FILE) == "code changed since the last proof"
    appended("requirements.lock")(root)
    assert why_stale(root, root / DIGITS_FILE) == "code and packages changed since the last proof"


def test_record_holds_nothing_but_digests(root: Path, before: States) -> None:
    written = json.loads(write_record(root, "digits", before["digits"]).read_text())
    assert sorted(written) == sorted(PARTS)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in written.values())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"code": "1"}', '"code"'])
def test_damaged_record_is_stale(content: str, root: Path) -> None:
    (root / "reports/proofs").mkdir()
    (root / record_file("digits")).write_text(content)
    reason = why_stale(root, root / DIGITS_FILE)
    assert reason is not None
    assert "reports/proofs/digits.json is " in reason


def test_committed_records_are_of_exact_tables() -> None:
    assert {path.stem for path in (ROOT / "reports/proofs").glob("*")} <= exact_tables(ROOT).keys()
