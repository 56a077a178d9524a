"""Measure one row, dense or sparse: record, per-layer diagnostics and pictures in ``…/runs/<row>/evaluation/``."""

from __future__ import annotations

from maskllm4v import layout
from maskllm4v.config import Experiment
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    import json

    from maskllm4v.diagnostics import COLUMNS
    from maskllm4v.evaluation import Measured, measure
    from maskllm4v.files import empty_folder, write_csv, write_text
    from maskllm4v.mask_statistics import describe_masks
    from maskllm4v.origin import read_origin, where
    from maskllm4v.parallel import map_seeds
    from maskllm4v.pictures import write_picture
    from maskllm4v.processes import is_main
    from maskllm4v.records import build_record, write_record
    from maskllm4v.tasks import open_task

    kind, seeds = experiment.kind(row), experiment.row_seeds(row)
    made = read_origin(experiment, row)
    task = open_task(experiment, layout.data_folder(experiment.data.name))

    def one(seed: int, position: int) -> Measured:
        dense = layout.checkpoint(experiment.dense.row, experiment.dense_seed(seed))
        masks = None if kind == "dense" else layout.checkpoint(row, seed)
        return measure(experiment, task, seed, dense, masks, experiment.pattern_of(row))

    measured = dict(zip(seeds, map_seeds(experiment, seeds, one), strict=True))
    if not is_main():
        return
    empty_folder(layout.evaluation_folder(experiment.table, row))  # no picture of an earlier run survives
    lines = ((seed, *line) for seed, found in measured.items() for line in found.layers)
    write_csv(layout.layers_file(experiment.table, row), ("seed", *COLUMNS), lines)
    if (weight := measured[seeds[0]].weight) is not None:
        names = [line[0] for line in measured[seeds[0]].layers]
        seen = describe_masks(weight, {seed: layout.checkpoint(row, seed) for seed in seeds}, names)
        write_csv(layout.mask_statistics_file(experiment.table, row), seen.header, seen.lines)
        write_text(layout.tile_file(experiment.table, row), json.dumps(seen.tile, sort_keys=True) + "\n")
    for name, pixels in measured[seeds[0]].pictures.items():
        write_picture(layout.picture_file(experiment.table, row, name), pixels)
    record = build_record(
        row=row,
        kind=kind,
        settings=experiment.record_settings(row),
        metrics={seed: found.metrics for seed, found in measured.items()},
        summaries={seed: found.summary for seed, found in measured.items()},
        inputs={
            "manifest": task.data_digest,
            "dense": [found.dense for found in measured.values()],
            "masks": [found.masks for found in measured.values() if found.masks is not None],
        },
        parameters=measured[seeds[0]].parameters,
        made=made,
        evaluated=where(experiment),
    )
    write_record(layout.record_file(experiment.table, row), record)  # the last one: no record of half an evaluation
    for found in measured.values():
        if found.summary:
            print(json.dumps(found.summary, indent=4))
    print(f"{row}: {record['metrics']}")


if __name__ == "__main__":
    run("evaluate", main)
