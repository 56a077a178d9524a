"""Proving tables in a clone: what is chosen, what counts as reproduced, what is said and kept. Nothing is trained."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from import_graph import ROOT

from maskllm4v.receipts.locks import stages_file
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import read_json
from scripts import prove
from scripts.proof_records import current_state, exact_tables, record_file, write_record

TABLES = ("digits_patterns", "dit_digits", "digits")  # in the order of their proofs
REPORT = """\
  report:
    cmd: python -m stages.report
    deps:
    - path: reports/digits/runs
"""
ROWS = {"digits": "digits-ria", "digits_patterns": "digits-patterns-4of8-maskllm", "dit_digits": "dit-wanda"}
ACTIVE = "set -- $(sed -n 's/^table: //p' params.yaml); "
RECEIPT = ("sh", "-ec", f'since="$0"; {ACTIVE} echo "$since" > "receipt-$1.json"')  # when the proof began is added
NOTHING = {"proof": ("true",), "receipt": RECEIPT, "rendering": ("true",), "check": ("true",)}


def in_shell(**commands: str) -> dict[str, tuple[str, ...]]:
    """Commands in place of DVC and of rendering; ``$1`` in them is the active table."""
    return {**NOTHING, **{kind: ("sh", "-ec", ACTIVE + text) for kind, text in commands.items()}}


def commit(folder: Path) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", *who, "commit", "-qm", "all of it"], cwd=folder, check=True)


def locked(table: str) -> str:
    row = ROWS[table]
    return f"schema: '2.0'\nstages:\n  evaluate@{row}:\n    cmd: python -m stages.evaluate {row}\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the settings of real tables, a line of results each, and little code."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml", ".gitignore", *(f"experiments/{table}.yaml" for table in TABLES)):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in (*(f"reports/{table}/runs/row/record.json" for table in TABLES), "maskllm4v/utils/errors.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("1\n")
    (folder / "requirements.lock").write_text("torch\n")
    (folder / "dvc.lock").write_text(locked("digits") + REPORT)
    for table in TABLES[:-1]:
        (folder / stages_file(table)).write_text(locked(table))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    commit(folder)
    return folder


@pytest.fixture
def root(project: Path, tmp_path: Path) -> Path:
    return shutil.copytree(project, tmp_path / "root")


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    return cloned(root, tmp_path / "clone")


def cloned(root: Path, to: Path) -> Path:
    subprocess.run(["git", "clone", "-q", str(root), str(to)], check=True)
    return to


def records(root: Path) -> set[str]:
    return {path.stem for path in (root / "reports/proofs").glob("*.json")}


# Which tables


def test_all_tables_are_proved_or_those_asked_for(root: Path) -> None:
    assert list(prove.plan(root)) == list(TABLES)
    assert prove.plan(root, ["digits", "dit_digits"]) == {"dit_digits": "asked for", "digits": "asked for"}
    with pytest.raises(UserError, match="no exact table 'cifar10' in the last commit; allowed: digits_patterns, dit"):
        prove.plan(root, ["digits", "cifar10"])


def test_ci_proves_the_active_table_and_the_stale_ones(root: Path) -> None:
    missing = {table: f"reports/proofs/{table}.json is missing" for table in TABLES[:-1]}
    assert prove.plan(root, stale=True) == {**missing, "digits": "always"}
    for table, file in exact_tables(root).items():
        write_record(root, table, current_state(root, file))
    assert prove.plan(root, stale=True) == {"digits": "always"}
    (root / "reports/dit_digits/runs/row/record.json").write_text("2\n")
    assert prove.plan(root, stale=True) == {"dit_digits": "outputs changed since the last proof", "digits": "always"}


# Proofs


def test_receipts_are_left_of_what_was_proved_equal_or_not(root: Path, clone: Path) -> None:
    begin = time.time()
    changed = in_shell(proof='echo 2 > "reports/$1/runs/row/record.json"')
    assert prove.prove(clone, ["dit_digits"], changed, root)
    assert [path.name for path in root.glob("receipt-*.json")] == ["receipt-dit_digits.json"]
    assert begin - 1 < float((root / "receipt-dit_digits.json").read_text()) < time.time() + 1
    (root / "receipt-dit_digits.json").unlink()
    prove.prove(clone, ["dit_digits"], NOTHING, None)
    assert not list(root.glob("receipt-*.json"))


def test_reproduced_tables_get_records_of_the_commit(root: Path, clone: Path) -> None:
    expected = {table: current_state(clone, file) for table, file in exact_tables(clone).items()}
    (root / "maskllm4v/utils/errors.py").write_text("not committed\n")
    made = in_shell(proof='echo "$1" >> ../proved; mkdir artifacts; echo x > "artifacts/$1"; rm -r artifacts')
    assert prove.prove(clone, TABLES, made, root) == []
    assert (clone.parent / "proved").read_text().split() == list(TABLES)
    assert {table: read_json(root / record_file(table)) for table in TABLES} == expected
    assert not records(clone)


def test_other_tables_are_rendered_and_get_no_record(root: Path, clone: Path) -> None:
    made = in_shell(
        proof='echo "proof $1" >> ../log', rendering='echo "rendering $1" >> ../log', check="echo >> ../log"
    )
    assert prove.prove(clone, ["dit_digits"], made, root) == []
    expected = ["rendering digits_patterns", "proof dit_digits", "rendering digits", ""]
    assert (clone.parent / "log").read_text().splitlines() == expected
    assert records(root) == {"dit_digits"}


def test_ci_renews_nothing(root: Path, clone: Path) -> None:
    assert prove.prove(clone, TABLES, NOTHING, None) == []
    assert not records(root)
    assert not records(clone)


DIFFERENCES = {
    "another byte": "echo 2 > reports/$1/runs/row/record.json",
    "a missing file": "rm reports/$1/runs/row/record.json",
    "a new file": "echo 1 > reports/$1/runs/row/more.csv",
    "other tensors": "sed -i 's/stages.evaluate/& -v/' dvc.lock",
    "a failure": "false",
    "a failure and another byte": "echo 2 > reports/$1/runs/row/record.json; false",
}


@pytest.mark.parametrize("kind", DIFFERENCES)
@pytest.mark.parametrize("table", TABLES)
def test_a_difference_fails_its_table_alone(
    table: str, kind: str, root: Path, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = in_shell(proof=f'[ "$1" != {table} ] || {{ {DIFFERENCES[kind]}; }}')
    assert prove.prove(clone, TABLES, made, root) == [f"proof of {table}"]
    assert records(root) == set(TABLES) - {table}
    said = capsys.readouterr().out
    assert said.count(f"proof of {table} FAILED: ") == 1 + kind.count(" and ")
    assert "FAILED" not in said.replace(f"proof of {table} FAILED: ", "")


def test_difference_is_shown_by_name_and_content(root: Path, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = "reports/dit_digits/runs/row/record.json"
    change = "sed -i 's/stages.evaluate/& -v/' dvc.lock; seq 100 > reports/$1/runs/row/record.json"
    prove.prove(clone, ["dit_digits"], in_shell(proof=change), root)
    said = capsys.readouterr().out
    assert f" M {record}\n M reports/dit_digits/stages.lock\n" in said.partition("\n+")[0]  # names come first
    assert " 2 files changed, 100 insertions(+), 1 deletion(-)" in said
    assert "stages that read or wrote something else: evaluate@dit-wanda\n" in said
    content = said.partition(f"+++ b/{record}\n")[2]
    assert content.startswith("@@ -1 +1,100 @@\n 1\n+2\n+3\n")
    assert "\n+54\n+55\n... and 45 lines more\n" in content
    assert "\n+56\n" not in content


def test_tensors_alone_are_shown_in_the_lock_file(root: Path, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prove.prove(clone, ["dit_digits"], in_shell(proof="sed -i 's/stages.evaluate/& -v/' dvc.lock"), root)
    assert "+    cmd: python -m stages.evaluate -v dit-wanda\n" in capsys.readouterr().out


def test_only_the_active_table_is_in_the_lock_files_report(root: Path, clone: Path) -> None:
    made = in_shell(proof='sed -i "s,reports/.*/runs,reports/$1/runs," dvc.lock')
    assert prove.prove(clone, TABLES, made, root) == []
    wrong = in_shell(proof='sed -i "s,reports/.*/runs,reports/elsewhere/runs," dvc.lock')
    assert prove.prove(clone, TABLES, wrong, root) == ["proof of digits"]


def test_rendering_and_the_check_of_the_rest_are_part_of_it(
    root: Path, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = in_shell(rendering="echo 2 > reports/$1/table.md", check="exit 3")
    failed = prove.prove(clone, ["digits"], made, root)
    assert failed == [*(f"rendering of {table}" for table in TABLES[:-1]), "check of README, tables and pages"]
    assert "ended with status 3\n" in capsys.readouterr().out
    assert records(root) == {"digits"}


def test_users_mlflow_server_is_left_alone(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    made = in_shell(proof='[ -z "$MLFLOW_TRACKING_URI$PYTHONPATH" ]; [ "$(command -v python)" = "$0" ]')
    made["proof"] = (*made["proof"], str(Path(sys.executable).parent / "python"))
    assert prove.prove(clone, TABLES, made, None) == []


# The command


def command(
    root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, made: dict[str, tuple[str, ...]] = NOTHING
) -> int | str | None:
    """Exit status of ``python -m scripts.prove``."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["prove", *arguments])
    monkeypatch.setattr(prove, "COMMANDS", made)
    try:
        prove.main()
    except SystemExit as end:
        return end.code
    return 0


def test_command_says_what_it_proves_and_why(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(root, monkeypatch) == 0
    assert records(root) == set(TABLES)
    said = capsys.readouterr().out
    assert " all of it\n  digits_patterns: asked for\n" in said
    assert "uncommitted" not in said
    assert said.endswith(
        "proof: every committed result of digits_patterns, dit_digits, digits was reproduced exactly\n"
    )

    commit(root)  # the records
    (root / "requirements.lock").write_text("torch, newer\n")
    assert command(root, monkeypatch, "--stale") == 0
    plan, _, _ = capsys.readouterr().out.partition("uncommitted changes are not part of it\n")
    assert plan.endswith("not run again, only rendered\n  digits: always\n")

    commit(root)
    assert command(root, monkeypatch, "--stale") == 0
    assert "  dit_digits: packages changed since the last proof\n" in capsys.readouterr().out


def test_command_fails_with_the_tables_name(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = in_shell(proof="echo 2 > reports/$1/runs/row/record.json")
    assert command(root, monkeypatch, "digits", "dit_digits", made=made) == (
        "\nFAILED: proof of dit_digits; proof of digits"
    )
    assert command(root, monkeypatch, "cifar10") == (
        "proof: no exact table 'cifar10' in the last commit; allowed: digits_patterns, dit_digits, digits"
    )
    assert command(root, monkeypatch, "digits", "--stale") == 2
    assert not records(root)
    assert (root / "reports/digits/runs/row/record.json").read_text() == "1\n"


def test_make_runs_it(tmp_path: Path) -> None:
    """``make proof`` hands over the tables, and what CI runs renews nothing."""
    for arguments, expected in (
        (["proof"], "python -m scripts.prove"),
        (["proof", "TABLES=digits dit_digits"], "python -m scripts.prove digits dit_digits"),
        (["proof-ci"], "python -m scripts.prove --stale"),
    ):
        command = ["make", "-n", "-C", str(ROOT), "--no-print-directory", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1].strip() == expected
