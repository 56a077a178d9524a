"""Update the weights that another row's masks keep: ``artifacts/<row>/seed<k>.safetensors``."""

from __future__ import annotations

from maskllm4v.config import Experiment, UpdatedRow
from maskllm4v.runs.paths import checkpoint, data_folder
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from dataclasses import replace

    from maskllm4v.checkpoints.masks import load_dense, load_masks, save_masks
    from maskllm4v.oneshot.weight_update import update_weights_
    from maskllm4v.runs.makers import check_inputs, note_maker
    from maskllm4v.runs.provenance import write_origin
    from maskllm4v.runs.seeds import map_seeds
    from maskllm4v.sparsity.parameters import dense_weights
    from maskllm4v.sparsity.permutation import apply_permutations_
    from maskllm4v.sparsity.surgery import apply_masks_
    from maskllm4v.tasks.base import open_task
    from maskllm4v.utils.processes import is_main

    updated = experiment.row_of(UpdatedRow, row)
    settings, pattern = updated.settings, updated.pattern or ""
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))

    def one(seed: int, position: int) -> None:
        model, dense = task.build_model(seed), checkpoint(experiment.dense.row, experiment.dense_seed(seed))
        base = load_dense(dense, model, experiment.model.name)
        source = task if settings.inputs == "data" else task.generated(model, seed)
        found = load_masks(checkpoint(settings.masks, seed), pattern=pattern, base=base)  # not its weights, if any
        check_inputs(experiment, seed, base, settings.masks, found.digest)
        apply_permutations_(model, found.permutations)
        made = replace(found, weights={})
        if updated.updates_weights:
            update_weights_(
                apply_masks_(model, found.masks, pattern),
                settings.update,
                calibration=source.calibration(settings.batch_size, seed),
                target=settings.target if "target" in settings.model_fields_set else None,
                damping=settings.damping,
            )
            weights = dense_weights(model, found.masks)
            made = replace(found, method=settings.update, weights=weights)
        if is_main():
            note_maker(row, seed, save_masks(checkpoint(row, seed), made))

    map_seeds(experiment, updated.seeds, one)
    write_origin(experiment, row)


if __name__ == "__main__":
    run("update", main)
