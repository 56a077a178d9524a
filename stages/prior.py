"""Prune every seed's dense model in one shot: ``artifacts/<row>/seed<k>.safetensors``."""

from __future__ import annotations

from typing import Any

from maskllm4v.config import Experiment, OneShotRow
from maskllm4v.runs.paths import checkpoint, data_folder
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from maskllm4v.checkpoints.masks import MaskCheckpoint, load_dense, save_masks
    from maskllm4v.oneshot.permute import permute_channels_
    from maskllm4v.oneshot.prune import calibrates, prune
    from maskllm4v.runs.makers import check_inputs, note_maker
    from maskllm4v.runs.provenance import write_origin
    from maskllm4v.runs.seeds import map_seeds
    from maskllm4v.sparsity.parameters import dense_weights
    from maskllm4v.sparsity.patterns import NMPattern
    from maskllm4v.tasks.base import open_task
    from maskllm4v.utils.processes import is_main

    oneshot = experiment.row_of(OneShotRow, row)
    settings, pattern = oneshot.settings, NMPattern(oneshot.pattern or "")
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))

    def one(seed: int, position: int) -> None:
        model, dense = task.build_model(seed), checkpoint(experiment.dense.row, experiment.dense_seed(seed))
        base = load_dense(dense, model, experiment.model.name)
        check_inputs(experiment, seed, base)
        calibrated_on = task if settings.inputs == "data" else task.generated(model, seed)
        layers: Any = {"exclude": experiment.model.excluded_layers, "on_misfit": experiment.model.on_misfit}
        shown = calibrated_on.calibration(settings.batch_size, seed) if calibrates(settings.method) else None
        greedy = settings.permutation == "greedy"  # by the method's score: of its inputs, or of the weights alone
        permutations = permute_channels_(model, pattern, calibration=shown, **layers) if greedy else {}
        masks = prune(
            model,
            settings.method,
            pattern=pattern,
            calibration=calibrated_on.calibration(settings.batch_size, seed),
            update_weights=settings.update_weights,
            propagate=settings.propagate,
            convolutions=experiment.model.convolutions,
            seed=seed,
            **layers,
        )
        weights = dense_weights(model, masks) if settings.update_weights else {}
        if is_main():
            made = MaskCheckpoint(pattern, masks, base, settings.method, weights, prior={}, permutations=permutations)
            note_maker(row, seed, save_masks(checkpoint(row, seed), made))

    map_seeds(experiment, oneshot.seeds, one)
    write_origin(experiment, row)


if __name__ == "__main__":
    run("prior", main)
