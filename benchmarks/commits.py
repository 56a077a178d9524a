"""What whole stages of the active table cost at two commits, in seconds of processor time.

    python -m benchmarks.commits REVISION [--repeats 3] [--stages train finetune]

Both commits are cloned and make what the stages need; then one stage of each kind runs in turn in both clones, start of
the process included. A kind that a table has several lengths of is measured for each number of steps. `total` adds up
all items of the table, each at its kind's cost: what `dvc repro` of it costs, reports and MLflow aside.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Timing, ratio
from benchmarks.results import Row, save
from maskllm4v.config import Experiment, load_experiment

LONG = 40.0  # seconds: stages that take longer run once
NOTES = [
    "seconds: user and system time of the stage's process and its forks; median of n, commits in turn."
    " Stages of more than 40 s ran once.",
    "items: how many of the table's stages are of that kind; total: their sum.",
]


def items(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """Kind, stage and row of all that computes, in an order in which it can run."""
    yield "prepare", "prepare", experiment.data.name
    yield "dense", "dense", experiment.dense.row
    for row, prior in experiment.priors.items():
        yield f"prior, {prior.method}", "prior", row
    waiting = [*experiment.updated, *experiment.learned]
    while waiting:
        row = next(row for row in waiting if _source(experiment, row) not in waiting)
        waiting.remove(row)
        if row in experiment.updated:
            yield "update", "update", row
            continue
        made = experiment.learned[row]
        yield f"train, {made.steps} steps{', distilled' if made.distillation else ''}", "train", row
    for row in experiment.finetuned:
        yield "finetune", "finetune", row
    for row in experiment.rows:
        yield f"evaluate, {'dense' if row == experiment.dense.row else 'masked'}", "evaluate", row
    for row in experiment.exports:
        yield "export", "export", row


def cpu_seconds(command: list[str], folder: Path) -> float:
    """User and system time of a command and all it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(experiment: Experiment, clones: dict[str, Path], repeats: int) -> list[Row]:
    """A row per kind: its first item, in turn in both clones."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for kind, stage, row in items(experiment):
        kinds.setdefault(kind, []).append((stage, row))

    def run(folder: Path, stage: str, row: str) -> float:
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # states of trainings
        return cpu_seconds([sys.executable, "-m", f"stages.{stage}", row], folder)

    needed = {row for kind, stage, row in items(experiment) if kind in kinds and (stage, row) == kinds[kind][0]}
    needed |= _sources(experiment, needed)
    rows: list[Row] = []
    done: set[str] = set()
    for kind, stage, row in items(experiment):
        first = kinds[kind][0] == (stage, row)
        if not first and (stage in ("evaluate", "export") or row not in needed or row in done):
            continue
        samples: dict[str, list[float]] = {name: [] for name in clones}
        for _ in range(repeats if first else 1):
            for name, folder in clones.items():
                samples[name].append(run(folder, stage, row))
            if min(map(sum, samples.values())) > LONG:
                break
        done.add(row)
        if first:
            before, after = (Timing.of(found) for found in samples.values())
            rows.append(_row(kind, len(kinds[kind]), before, after))
            print(rows[-1], flush=True)
    total = {key: sum(float(row["items"]) * float(row[key]) for row in rows) for key in ("before_s", "after_s")}
    count = sum(int(row["items"]) for row in rows)
    rows.append({"kind": "total", "items": count, **total, "ratio": total["after_s"] / total["before_s"]})
    return rows


def _row(kind: str, count: int, before: Timing, after: Timing) -> dict[str, Any]:
    seconds = {"before_s": before.median, "after_s": after.median, "ratio": ratio(after, before).median}
    return {"kind": kind, "items": count, "n": before.n, **seconds}


def _source(experiment: Experiment, row: str) -> str | None:
    """The row that a row is made from, the dense one aside."""
    if row not in experiment.rows:  # the data
        return None
    source = experiment.row(row).source
    return None if source is None else source.key


def _sources(experiment: Experiment, rows: set[str]) -> set[str]:
    """All rows that some are made from."""
    found = {source for row in rows if (source := _source(experiment, row))}
    return found | _sources(experiment, found) if found else found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("revision", help="the commit before; the one after is HEAD")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        clones = {"before": Path(folder) / "before", "after": Path(folder) / "after"}
        for clone, revision in zip(clones.values(), (given.revision, "HEAD"), strict=True):
            subprocess.run(["git", "clone", "-q", ".", str(clone)], check=True)
            subprocess.run(["git", "checkout", "-q", revision], cwd=clone, check=True)
        rows = measure(load_experiment(), clones, given.repeats)
    save("commits", {"stages": rows}, NOTES, given.out)


if __name__ == "__main__":
    main()
