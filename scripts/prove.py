"""Run exact tables again in an empty folder: is every committed byte of them reproduced?

    python -m scripts.prove                all exact tables; renews the records of those that are, and leaves receipts
    python -m scripts.prove dit_digits     some of them
    python -m scripts.prove --stale        the active table, and those whose record does not match; renews nothing

The last commit is proved, in a clone. Exact tables that are not run again are rendered again, from their records.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from maskllm4v.config import PARAMS, load_experiment
from maskllm4v.receipts import receipt_file
from maskllm4v.receipts.locks import LOCK, RENDERING, activate, is_lock, locked_stages
from maskllm4v.utils.errors import UserError
from scripts.proof_records import (
    current_state,
    exact_tables,
    why_stale,
    write_record,
)

COMMANDS: Mapping[str, Sequence[str]] = {  # in the clone, params.yaml naming the table
    "proof": (sys.executable, "-m", "dvc", "repro", "-f"),
    "receipt": (sys.executable, "-m", "maskllm4v", "receipt", "--since"),  # and when the proof began
    "rendering": (sys.executable, "-m", "stages.report"),
    "check": (sys.executable, "-m", "maskllm4v", "report", "--check"),
}
SHOWN_LINES, SHOWN_WIDTH = 60, 160  # of a difference


def plan(clone: Path, named: Sequence[str] = (), *, stale: bool = False) -> dict[str, str]:
    """The tables to prove, in order, and why each.

    Args:
        clone: a clone of the repository.
        named: tables that a person asks for; none: all.
        stale: of all tables, only the active one and those whose record does not match.

    Raises:
        UserError: a name is not that of an exact table.
    """
    tables = exact_tables(clone)
    if unknown := [table for table in named if table not in tables]:
        raise UserError(f"no exact table {unknown[0]!r} in the last commit; allowed: {', '.join(tables)}")
    if not stale:
        return {table: "asked for" for table in tables if table in named or not named}
    active = load_experiment(clone / PARAMS).table
    reasons = {table: "always" if table == active else why_stale(clone, file) for table, file in tables.items()}
    return {table: reason for table, reason in reasons.items() if reason}


def prove(
    clone: Path, tables: Collection[str], commands: Mapping[str, Sequence[str]], records: Path | None
) -> list[str]:
    """Prove tables, one after the other; returns what failed, each with the table's name.

    Args:
        clone: a clone of the repository, without results that are not committed.
        tables: to run again; other exact ones are only rendered again.
        commands: :data:`COMMANDS`, or others in a test.
        records: the repository to write records of reproduced tables into, and receipts; None writes none.
    """
    failed = []
    active, files = load_experiment(clone / PARAMS).table, exact_tables(clone)
    for table, file in files.items():
        kind, begin = "proof" if table in tables else "rendering", time.monotonic()
        what = f"{kind} of {table}"
        print(f"\n{what}")
        activate(clone, file)
        done, since = succeeds(clone, commands[kind], what), str(time.time() - (time.monotonic() - begin))
        if kind == "proof" and records is not None and succeeds(clone, (*commands["receipt"], since), "receipt"):
            shutil.copy(receipt_file(clone, table), receipt_file(records, table))  # what came out, equal or not
        activate(clone, files[active])
        if not all((done, unchanged(clone, what, is_active=table == active))):
            failed.append(what)
            continue
        if kind == "proof":
            print(f"{what}: every committed byte was reproduced, in {time.monotonic() - begin:.0f} s")
        if kind == "proof" and records is not None:
            print(f"renewed {write_record(records, table, current_state(clone, file))}; commit it")
    print("\ncheck of README, tables and pages")
    if not succeeds(clone, commands["check"], "check"):
        failed.append("check of README, tables and pages")
    return failed


def succeeds(clone: Path, command: Sequence[str], what: str) -> bool:
    """Run a command in the clone, as the user would but without his MLflow server; says so if it fails."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "PYTHONPATH")}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))
    status = subprocess.run(command, cwd=clone, env=environment, check=False).returncode
    if status:
        print(f"{what} FAILED: `{' '.join(command)}` ended with status {status}")
    return status == 0


def unchanged(clone: Path, what: str, *, is_active: bool) -> bool:
    """Whether the clone is as committed, but for which table is active; shows differences, and takes them back."""
    git(clone, "checkout", "-q", "--", str(PARAMS))  # a comment may tell it from the experiment's file
    other: set[str] = set()
    for path in filter(is_lock, git(clone, "ls-files").splitlines()):
        before = locked_stages(git(clone, "show", f"HEAD:{path}"))
        after = locked_stages((clone / path).read_bytes()) if (clone / path).exists() else {}
        other |= {name for name in {**before, **after} if before.get(name) != after.get(name)}
    if not is_active and other <= RENDERING:  # it holds those of one table only
        git(clone, "checkout", "-q", "--", LOCK)
    if not (names := git(clone, "status", "--porcelain", "--untracked-files=all")):
        return True
    print(f"{what} FAILED: not what is committed:\n{names}\n{git(clone, 'diff', f'--stat={SHOWN_WIDTH}')}")
    if other:
        print(f"stages that read or wrote something else: {', '.join(sorted(other))}\n")
    lines = (git(clone, "diff", "--", ".", ":!dvc.lock", ":!reports/*/stages.lock") or git(clone, "diff")).splitlines()
    print("\n".join(line[:SHOWN_WIDTH] for line in lines[:SHOWN_LINES]))
    if len(lines) > SHOWN_LINES:
        print(f"... and {len(lines) - SHOWN_LINES} lines more")
    git(clone, "checkout", "-q", "--", ".")
    git(clone, "clean", "-fdq")
    return False


def git(folder: Path, *arguments: str) -> str:
    """What git prints."""
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.prove", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help="exact tables; default: all")
    parser.add_argument("--stale", action="store_true", help="only where a proof is due, as in CI")
    arguments = parser.parse_args()
    if arguments.tables and arguments.stale:
        parser.error("--stale chooses the tables")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the stages print in between
    try:
        with TemporaryDirectory(prefix="proof-") as folder:
            clone = Path(folder) / "clone"
            git(Path(), "clone", "-q", ".", str(clone))
            tables = plan(clone, arguments.tables, stale=arguments.stale)
            print(f"to prove, in an empty folder: {git(clone, 'log', '-1', '--format=%h %s').strip()}")
            for table in exact_tables(clone):
                print(f"  {table}: {tables.get(table, 'not run again, only rendered')}")
            if git(Path(), "status", "--porcelain"):
                print("uncommitted changes are not part of it")
            failed = prove(clone, tables, COMMANDS, None if arguments.stale else Path())
    except UserError as error:
        sys.exit(f"proof: {error}")
    if failed:
        sys.exit(f"\nFAILED: {'; '.join(failed)}")
    print(f"\nproof: every committed result of {', '.join(tables)} was reproduced exactly")


if __name__ == "__main__":
    main()
