"""What each row of a table costs on this machine, in seconds for one seed, in the setting that its stage runs in.

    python -m benchmarks.table_cost                 # all of the tables made here, a process each
    python -m benchmarks.table_cost digits_patterns # one of them; the others' numbers stay

One-shot rows: pruning, calibration on random images included. Trained rows: a step of the training loop on random
images, times the row's steps, and making the samples that it learns from, if any; neither data loading nor the prior.
The dense row: nothing. Results go to
``reports/benchmarks/table_cost.json``, from which the tables' cost column is rendered.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.runs.paths import REPORTS
from maskllm4v.utils import determinism
from maskllm4v.utils.io import read_json, write_json

TABLES = ("digits", "digits_patterns", "cifar10", "dit_digits", "digits_segmentation", "digits_detection")
DEFAULT = REPORTS / "benchmarks" / "table_cost.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tables", nargs="*", default=TABLES, metavar="TABLE", help="name of a file in experiments/")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a repetition, few steps and images: does it run at all?")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="JSON file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # one table, here; writes to that file
    given = parser.parse_args(arguments)
    repeats = 1 if given.quick else given.repeats
    if given.measure:
        measure(given.tables[0], given.measure, repeats, quick=given.quick)
        return
    tables = read_json(given.out)["tables"] if given.out.exists() else {}
    for table in given.tables:
        tables[table] = _in_a_process(table, repeats, quick=given.quick)
        write_json(given.out, {"name": "table_cost", "tables": tables})
    print(given.out)


def _in_a_process(table: str, repeats: int, *, quick: bool) -> dict[str, Any]:
    """The exact pin has to be set before torch is imported, and holds for a whole process."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "cost.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.table_cost",
            table,
            "--repeats",
            str(repeats),
            "--measure",
            str(found),
        ]
        subprocess.run([*command, "--quick"] if quick else command, check=True)
        cost: dict[str, Any] = read_json(found)
        return cost


def measure(table: str, out: Path, repeats: int, *, quick: bool) -> None:
    """Measure all rows of a table in this process, which has not imported torch yet."""
    experiment = load_experiment(Path("experiments") / f"{table}.yaml")
    if experiment.exact:
        determinism.pin_kernels()
    import torch

    from benchmarks.results import rounded_row
    from benchmarks.row_cost import Rows
    from maskllm4v.runs.records import versions
    from maskllm4v.utils.devices import hardware, pick_device

    device = pick_device(experiment.runtime.device)
    if experiment.exact:
        determinism.pin_torch()
    elif device.type == "cpu":
        torch.set_num_threads(stage_threads(experiment))
    rows, costs = Rows(experiment, device, repeats=repeats, quick=quick), dict[str, Any]()
    for row in experiment.rows:
        if experiment.row(row).kind != "dense":
            costs[row] = rounded_row(dict(rows.cost(row)))
            print(f"{table}  {row:34}  {costs[row]['seconds']:9.4g} s  n = {costs[row]['n']}", flush=True)
    machine = {"hardware": hardware(device), "threads": torch.get_num_threads(), "versions": versions()}
    write_json(out, {**machine, "exact": experiment.exact, "rows": costs})


def stage_threads(experiment: Experiment) -> int:
    """CPU threads of one seed where seeds run side by side; see :func:`maskllm4v.runs.seeds.map_seeds`."""
    from maskllm4v.runs.seeds import seed_processes

    processes = min(len(experiment.seeds), seed_processes(experiment))
    cores = os.cpu_count() or 1
    return max(1, cores // processes)


if __name__ == "__main__":
    main()
