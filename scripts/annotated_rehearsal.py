"""A recipe of segmentation or detection from end to end, on made pictures and a tiny random model: a rehearsal.

    python scripts/annotated_rehearsal.py RECIPE [--batch-size 2] [--steps 2] [key=value ...]

RECIPE is ``own_masks``, ``own_coco``, or another table of ``experiments/`` with masks or boxes and a model of
transformers. In a temporary copy of the project, pictures (:mod:`made_pictures`) and the model's folder
(:mod:`tiny_models`) are made where the recipe looks for them; ``params.yaml`` is the recipe with nothing but values
overridden, and ``dvc repro`` runs prepare, dense, priors, masks, controls, evaluation, export, report and MLflow.
Scores mean nothing. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
from typing import Any

import made_pictures
import rehearsal
import tiny_models


def shortened(params: dict[str, Any], steps: int, batch_size: int) -> dict[str, Any]:
    """What is overridden: the size of images, of sets and batches, and the length of each training, in its own unit."""
    held = min(params["data"].get("holdout", 0), 4)
    overrides: dict[str, Any] = {
        "data.calibration": 4,
        "data.holdout": held,
        "model.input.img_size": tiny_models.SIZE,
        "task.eval_batch_size": 4,
        "task.pictured": 2,
        "learning.accumulate": 1,
        "learning.log_every": 1,
        "runtime.loader_workers": 0,
    }
    trainings = {"dense": params["dense"], "learning": params["learning"]}
    trainings |= {f"{kind}.{row}": own for kind in ("learned", "finetuned") for row, own in params[kind].items()}
    overrides |= {f"{where}.batch_size": batch_size for where, own in trainings.items() if "batch_size" in own}
    return overrides | rehearsal.lengths(params, steps, (made_pictures.COUNTS["train"] - held) / batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="further key=value pairs, e.g. learning.amp=no")
    arguments = parser.parse_args()

    params = rehearsal.experiment(arguments.recipe)
    overrides = shortened(params, arguments.steps, arguments.batch_size)
    with rehearsal.project(arguments.recipe) as project:
        made_pictures.lay_out(params, project)
        rehearsal.run(project, rehearsal.overridden(params, overrides, arguments.overrides))


if __name__ == "__main__":
    main()
