"""Measure one row, dense or sparse: its record and per-layer diagnostics in ``reports/<table>/runs/<row>/``."""

from __future__ import annotations

from maskllm4v.config import Experiment
from maskllm4v.errors import CheckpointError
from maskllm4v.layout import checkpoint, data_folder, layers_file, record_file, settings_file
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from maskllm4v.devices import hardware, pick_device
    from maskllm4v.diagnostics import COLUMNS
    from maskllm4v.evaluation import Measured, measure
    from maskllm4v.files import read_json, write_csv
    from maskllm4v.parallel import map_seeds
    from maskllm4v.records import PINNED, build_record, write_record
    from maskllm4v.tasks import open_task

    kind, settings = experiment.kind(row), experiment.row_settings(row)
    if read_json(settings_file(row)) != settings:
        raise CheckpointError(f"{settings_file(row)}: these artifacts were made with other settings; make them again")
    task = open_task(experiment, data_folder(experiment.data.name))

    def one(seed: int, position: int) -> Measured:
        dense = checkpoint(experiment.dense.row, seed)
        return measure(experiment, task, seed, dense, None if kind == "dense" else checkpoint(row, seed))

    measured = dict(zip(experiment.seeds, map_seeds(experiment, one), strict=True))
    lines = ((seed, *line) for seed, found in measured.items() for line in found.layers)
    write_csv(layers_file(experiment.table, row), ("seed", *COLUMNS), lines)
    record = build_record(
        row=row,
        kind=kind,
        settings=settings,
        metrics={seed: found.metrics for seed, found in measured.items()},
        inputs={
            "manifest": task.data_digest,
            "dense": [found.dense for found in measured.values()],
            "masks": [found.masks for found in measured.values() if found.masks is not None],
        },
        parameters=measured[experiment.seeds[0]].parameters,
        hardware=PINNED if experiment.exact else hardware(pick_device(experiment.runtime.device)),
    )
    write_record(record_file(experiment.table, row), record)
    print(f"{row}: {record['metrics']}")


if __name__ == "__main__":
    run("evaluate", main)
