"""Every row of the ImageNet table, from end to end, on a handful of JPEGs and a few steps: a rehearsal.

    python scripts/imagenet_rehearsal.py FOLDER [--images 24] [--batch-size 4] [--steps 2] [key=value ...]

FOLDER holds images whose names begin with their class, ``n01440764_tench.JPEG``, or class folders of such.
They are laid out as ImageNet is, in a temporary copy of the project; ``params.yaml`` is
``experiments/imagenet_vit_b16.yaml`` with nothing but values overridden, a ViT-B/16 gets random weights,
and ``dvc repro`` runs prepare, dense, priors, masks, controls, evaluation, report and MLflow. Accuracies mean nothing;
speed and memory of the mask-learning step are printed, and written to a JSON file if asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rehearsal

TABLE = "imagenet_vit_b16"
WEIGHTS = "random.safetensors"


def random_weights(path: Path, args: dict[str, Any]) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("vit_base_patch16_224", **args).state_dict(), path)


def shortened(params: dict[str, Any], classes: int, *, images: int, batch_size: int, steps: int) -> dict[str, Any]:
    """What is overridden: the model's weights, the size of sets and batches, and the length of each training."""
    overrides: dict[str, Any] = {
        "data.classes": classes,
        "data.calibration": 8,
        "dense.init": "checkpoint",
        "dense.checkpoint": WEIGHTS,
        "learning.batch_size": batch_size,
        "learning.log_every": 1,
        "task.eval_batch_size": 8,
        "runtime.loader_workers": 0,
    }
    return overrides | rehearsal.lengths(params, steps, images / batch_size)


def main() -> None:
    arguments = rehearsal.arguments(__doc__, images=24, batch_size=4)

    with rehearsal.project(TABLE) as project:
        params = rehearsal.experiment(TABLE)
        classes = rehearsal.lay_out(arguments.folder, project / "data" / "imagenet", arguments.images)
        random_weights(project / WEIGHTS, params["model"]["args"])
        sizes = {"images": arguments.images, "batch_size": arguments.batch_size, "steps": arguments.steps}
        overrides = shortened(params, classes, **sizes)
        rehearsal.run(project, rehearsal.overridden(params, overrides, arguments.overrides))
        rehearsal.report(rehearsal.cost(project, list(params["learned"])[-1]), arguments.record)


if __name__ == "__main__":
    main()
