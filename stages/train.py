"""Learn the masks of one row from its prior: ``artifacts/<row>/`` and ``reports/<table>/runs/<row>/curves/``."""

from __future__ import annotations

from maskllm4v.config import Experiment, LearnedRow
from maskllm4v.runs.paths import checkpoint, cost_file, curve_file, data_folder, live_file
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from dataclasses import asdict, replace

    from maskllm4v.checkpoints.masks import load_dense, load_masks, save_masks
    from maskllm4v.runs.curves import GrowingCurve, write_curve
    from maskllm4v.runs.live import watched
    from maskllm4v.runs.makers import check_inputs, note_maker
    from maskllm4v.runs.provenance import write_origin
    from maskllm4v.runs.seeds import map_seeds
    from maskllm4v.sparsity.permutation import apply_permutations_
    from maskllm4v.sparsity.surgery import make_learnable
    from maskllm4v.tasks.base import open_task
    from maskllm4v.training.hybrid import kept_weights, start_from_updated_
    from maskllm4v.training.mask_learning import CURVE_COLUMNS, learn_masks
    from maskllm4v.training.resume import only_training, resume_of
    from maskllm4v.utils.io import write_aside
    from maskllm4v.utils.processes import is_main

    trained = experiment.row_of(LearnedRow, row)
    settings, pattern = trained.settings, trained.pattern
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))

    def one(seed: int, position: int) -> None:
        model, dense = task.build_model(seed), checkpoint(experiment.dense.row, experiment.dense_seed(seed))
        base = load_dense(dense, model, experiment.model.name)
        source = task if settings.inputs == "data" else task.generated(model, seed)
        prior = load_masks(checkpoint(settings.prior, seed), pattern=pattern, base=base)
        check_inputs(experiment, seed, base, settings.prior, prior.digest)
        apply_permutations_(model, prior.permutations)
        hybrid = trained.updates_weights
        teacher = start_from_updated_(model, prior, distillation=settings.distillation) if hybrid else None
        how = settings.model_dump(include={"prior_strength", "gate_std", "init", "hard", "gate"})
        make_learnable(model, prior.masks, pattern=pattern or "", seed=seed, **how)
        resume = resume_of(experiment, row, seed, manifest=task.data_digest, dense=base, prior=prior.digest)
        learned = learn_masks(
            model,
            source,
            settings,
            seed=seed,
            prior=prior.masks,
            row=row,
            position=position,
            teacher=teacher,
            resume=resume,
            watch=GrowingCurve(live_file(row, seed), CURVE_COLUMNS),
        )
        if is_main():
            made = replace(prior, method="maskllm", gate=settings.gate, prior=prior.masks, masks=learned.masks)
            weights = kept_weights(model, learned.masks) if hybrid else {}
            note_maker(row, seed, save_masks(checkpoint(row, seed), replace(made, weights=weights)))
            write_curve(curve_file(experiment.table, row, seed), CURVE_COLUMNS, learned.curve)
            write_aside(cost_file(row, seed), asdict(learned.cost))

    with only_training(row):
        with watched(experiment, row):
            map_seeds(experiment, trained.seeds, one)
        write_origin(experiment, row)


if __name__ == "__main__":
    run("train", main)
