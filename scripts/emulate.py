"""Do exact tables have the same bits on other CPUs? One stage of each kind, cut short, natively and emulated by QEMU.

    python -m scripts.emulate [--cpu Haswell EPYC] [--table digits ...] [--keep FOLDER] [--receipts FOLDER]

Needs Debian's package qemu-user. Each call of a stage that is compared takes the artifacts that were made natively, so
a difference is its own. The exit status is 1 if any byte differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from maskllm4v.receipts import CPU, Row, build_receipt, write_receipt
from maskllm4v.utils.errors import UserError
from scripts.emulation.processes import NATIVE
from scripts.emulation.running import Result, emulate
from scripts.emulation.shortened import exact_tables, shortened

ROOT = Path(__file__).resolve().parent.parent
CPUS = ("Haswell", "EPYC")  # an Intel and an AMD with AVX2; others: qemu-x86_64 -cpu help


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each call and CPU; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.emulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="extend", nargs="+", help=f"as QEMU calls it; default: {' '.join(CPUS)}")
    parser.add_argument("--table", action="extend", nargs="+", help="default: all exact tables")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where all files stay")
    parser.add_argument(
        "--receipts", type=Path, metavar="FOLDER", help="write a receipt per table and CPU there, for `receipt --add`"
    )
    given = parser.parse_args(arguments)
    try:
        with TemporaryDirectory(prefix="emulation-") as temporary:
            result = run(given.cpu or CPUS, given.table, (given.keep or Path(temporary)).resolve())
    except UserError as error:
        sys.exit(f"emulate: {error}")
    for cpu, seconds in result.seconds.items():
        print(f"{cpu}: {seconds:.0f} s of CPU; kernels: {', '.join(map(' '.join, result.kernels[cpu].items()))}")
    if given.receipts is not None:
        for path in write_receipts(result, given.receipts):
            print(path)
    failed = sum(not outcome.equal for outcome in result.outcomes)
    print(f"{len(result.outcomes) - failed} of {len(result.outcomes)} equal")
    return int(failed > 0)


def run(cpus: Sequence[str], tables: Sequence[str] | None, folder: Path) -> Result:
    """Compare some exact tables, by default all, on some CPUs.

    Raises:
        UserError: there is no such exact table, or see :func:`scripts.emulation.running.emulate`.
    """
    known = exact_tables(ROOT)
    if unknown := [table for table in tables or () if table not in known]:
        raise UserError(f"no exact table {unknown[0]!r}; allowed: {', '.join(known)}")
    experiments = {table: shortened(known[table]) for table in tables or known}
    return emulate(experiments, cpus, folder, root=ROOT)


def write_receipts(result: Result, folder: Path) -> list[Path]:
    """A receipt of each table on each emulated CPU: stage by stage, whether all that it wrote came out the same."""
    written, cpus = [], [cpu for cpu in result.seconds if cpu != NATIVE]
    for (table, experiment), cpu in itertools.product(exact_tables(ROOT).items(), cpus):
        found = result.of_table(table, cpu)
        if not found or any(outcome.fault for outcome in found.values()):
            continue  # not asked for, or without a result
        receipt = build_receipt(
            ROOT,
            experiment,
            cpu=CPU(name=cpu, architecture="x86_64", avx2=True),  # QEMU's name: its host's would be wrong
            emulator=result.emulator,
            chain="shortened",
            rows={name: Row.compared(outcome.native, outcome.digest) for name, outcome in found.items()},
        )
        written.append(folder / f"receipt-{table}-{cpu}.json")
        write_receipt(written[-1], receipt)
    return written


if __name__ == "__main__":
    sys.exit(main())
