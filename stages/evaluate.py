"""Measure one row, dense or sparse: record, per-layer diagnostics and pictures in ``…/runs/<row>/evaluation/``."""

from __future__ import annotations

from maskllm4v.config import Experiment
from maskllm4v.runs import paths
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    import json

    from maskllm4v.evaluation.evaluate import Measured, measure
    from maskllm4v.evaluation.layer_errors import COLUMNS
    from maskllm4v.evaluation.mask_stats import describe_masks
    from maskllm4v.runs.provenance import read_origin, where
    from maskllm4v.runs.records import build_record, write_record
    from maskllm4v.runs.seeds import map_seeds
    from maskllm4v.tasks.base import open_task
    from maskllm4v.utils.images import write_picture
    from maskllm4v.utils.io import empty_folder, write_csv, write_text
    from maskllm4v.utils.processes import is_main

    evaluated, made = experiment.row(row), read_origin(experiment, row)
    kind, seeds = evaluated.kind, evaluated.seeds
    spec = experiment.task_spec(judge=paths.judge_file(experiment.dense.row))
    task = open_task(spec, paths.data_folder(experiment.data.name))

    def one(seed: int, position: int) -> Measured:
        dense = paths.checkpoint(experiment.dense.row, experiment.dense_seed(seed))
        masks = None if kind == "dense" else paths.checkpoint(row, seed)
        return measure(experiment, task, seed, dense, masks, evaluated.pattern, row)

    measured = dict(zip(seeds, map_seeds(experiment, seeds, one), strict=True))
    if not is_main():
        return
    empty_folder(paths.evaluation_folder(experiment.table, row))  # no picture of an earlier run survives
    lines = ((seed, *line) for seed, found in measured.items() for line in found.layers)
    write_csv(paths.layers_file(experiment.table, row), ("seed", *COLUMNS), lines)
    if (weight := measured[seeds[0]].weight) is not None:
        names = [line[0] for line in measured[seeds[0]].layers]
        seen = describe_masks(weight, {seed: paths.checkpoint(row, seed) for seed in seeds}, names)
        write_csv(paths.mask_statistics_file(experiment.table, row), seen.header, seen.lines)
        write_text(paths.tile_file(experiment.table, row), json.dumps(seen.tile, sort_keys=True) + "\n")
    for name, pixels in measured[seeds[0]].pictures.items():
        write_picture(paths.picture_file(experiment.table, row, name), pixels)
    record = build_record(
        row=row,
        kind=kind,
        settings=evaluated.record_settings(),
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
    write_record(paths.record_file(experiment.table, row), record)  # the last one: no record of half an evaluation
    for found in measured.values():
        if found.summary:
            print(json.dumps(found.summary, indent=4))
    print(f"{row}: {record['metrics']}")


if __name__ == "__main__":
    run("evaluate", main)
