"""Learn the masks of one row from its prior: ``artifacts/<row>/`` and ``reports/<table>/runs/<row>/curves/``."""

from __future__ import annotations

from maskllm4v.config import Experiment
from maskllm4v.errors import ConfigError
from maskllm4v.layout import checkpoint, curve_file, data_folder, settings_file
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from maskllm4v.checkpoints import MaskCheckpoint, load_dense, load_masks, save_masks
    from maskllm4v.files import write_csv, write_json
    from maskllm4v.parallel import map_seeds
    from maskllm4v.surgery import make_learnable
    from maskllm4v.tasks import open_task
    from maskllm4v.training import CURVE_COLUMNS, learn_masks

    if experiment.kind(row) != "learned":
        raise ConfigError(f"{row!r} is no learned row; allowed: {', '.join(experiment.learned)}")
    settings = experiment.learned[row]
    task = open_task(experiment, data_folder(experiment.data.name))

    def one(seed: int, position: int) -> None:
        model = task.build_model(seed)
        base = load_dense(checkpoint(experiment.dense.row, seed), model, experiment.model.name)
        # Only the prior's masks: weights stay the dense model's own.
        prior = load_masks(checkpoint(settings.prior, seed), pattern=experiment.pattern, base=base)
        make_learnable(
            model,
            prior.masks,
            pattern=prior.pattern,
            prior_strength=settings.prior_strength,
            gate_std=settings.gate_std,
            init=settings.init,
            hard=settings.hard,
            seed=seed,
        )
        learned = learn_masks(model, task, settings, seed=seed, prior=prior.masks, row=row, position=position)
        found = MaskCheckpoint(prior.pattern, learned.masks, base, "maskllm", {}, prior.masks)
        save_masks(checkpoint(row, seed), found)
        points = ((int(point[0]), *(f"{value:.6g}" for value in point[1:])) for point in learned.curve)
        write_csv(curve_file(experiment.table, row, seed), CURVE_COLUMNS, points)

    map_seeds(experiment, one)
    write_json(settings_file(row), experiment.row_settings(row))


if __name__ == "__main__":
    run("train", main)
