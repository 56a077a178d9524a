"""Train weights on, dense or under a fixed mask: ``artifacts/<row>/`` and ``reports/<table>/runs/<row>/curves/``."""

from __future__ import annotations

from maskllm4v.config import Experiment, FinetunedRow
from maskllm4v.runs.paths import checkpoint, cost_file, curve_file, data_folder, live_file
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from dataclasses import asdict, replace

    from maskllm4v.checkpoints.apply import install
    from maskllm4v.checkpoints.masks import MaskCheckpoint, load_dense, load_masks, save_masks
    from maskllm4v.runs.curves import GrowingCurve, write_curve
    from maskllm4v.runs.live import watched
    from maskllm4v.runs.makers import check_inputs, note_maker
    from maskllm4v.runs.provenance import write_origin
    from maskllm4v.runs.seeds import map_seeds
    from maskllm4v.tasks.base import open_task
    from maskllm4v.training.finetuning import CURVE_COLUMNS, finetune
    from maskllm4v.training.resume import only_training, resume_of
    from maskllm4v.utils.io import write_aside
    from maskllm4v.utils.processes import is_main

    tuned = experiment.row_of(FinetunedRow, row)
    settings, start = tuned.settings, tuned.source
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))

    def one(seed: int, position: int) -> None:
        model, dense = task.build_model(seed), checkpoint(experiment.dense.row, experiment.dense_seed(seed))
        base = load_dense(dense, model, experiment.model.name)
        names = list(model.state_dict())
        found = MaskCheckpoint(None, {}, base, "finetuned", {}, prior={}, digest="")
        if start is not None:  # its mask, and its updated weights if it has any
            found = load_masks(checkpoint(start.key, seed), pattern=tuned.pattern, base=base)
            install(model, found, start.key)
        check_inputs(experiment, seed, base, None if start is None else start.key, found.digest)
        resume = resume_of(experiment, row, seed, manifest=task.data_digest, dense=base, start=found.digest)
        live = GrowingCurve(live_file(row, seed), CURVE_COLUMNS)
        curve, cost = finetune(model, task, settings, seed=seed, row=row, position=position, resume=resume, watch=live)
        if is_main():
            weights = {name: model.state_dict()[name] for name in names}
            made = replace(found, method="finetuned", weights=weights, prior={})
            note_maker(row, seed, save_masks(checkpoint(row, seed), made))
            write_curve(curve_file(experiment.table, row, seed), CURVE_COLUMNS, curve)
            write_aside(cost_file(row, seed), asdict(cost))

    with only_training(row):
        with watched(experiment, row):
            map_seeds(experiment, tuned.seeds, one)
        write_origin(experiment, row)


if __name__ == "__main__":
    run("finetune", main)
