"""Measure one row, dense or sparse: its record and its per-layer diagnostics in ``reports/<table>/``."""

from __future__ import annotations

from typing import Any

from maskllm4v.config import Experiment
from maskllm4v.layout import REPORTS, checkpoint, data_folder, diagnostics
from maskllm4v.records import PINNED, build_record, record_path, write_record
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from maskllm4v.data import read_manifest
    from maskllm4v.devices import hardware, pick_device
    from maskllm4v.diagnostics import COLUMNS
    from maskllm4v.evaluation import measure
    from maskllm4v.files import write_csv
    from maskllm4v.parallel import map_seeds
    from maskllm4v.tasks import open_task

    kind = experiment.kind(row)
    manifest = read_manifest(data_folder(experiment.data.name))
    task = open_task(experiment, data_folder(experiment.data.name))

    def one(seed: int, position: int) -> Any:
        dense = checkpoint(experiment.dense.row, seed)
        return measure(experiment, task, seed, dense, None if kind == "dense" else checkpoint(row, seed))

    found = map_seeds(experiment, one)
    lines = ((seed, *line) for seed, m in zip(experiment.seeds, found, strict=True) for line in m.layers)
    rounded = (tuple(f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in line) for line in lines)
    write_csv(diagnostics(experiment.table, row), ("seed", *COLUMNS), rounded)
    device = pick_device(experiment.runtime.device)
    record = build_record(
        row=row,
        kind=kind,
        settings=experiment.row_settings(row),
        metrics={seed: m.metrics for seed, m in zip(experiment.seeds, found, strict=True)},
        inputs={
            "manifest": manifest.digest,
            "dense": [m.dense for m in found],
            "masks": [m.masks for m in found if m.masks is not None],
        },
        parameters=found[0].parameters,
        hardware=PINNED if experiment.exact else hardware(device),
    )
    write_record(record_path(REPORTS, experiment.table, row), record)
    print(f"{row}: {record['metrics']}")


if __name__ == "__main__":
    run("evaluate", main)
