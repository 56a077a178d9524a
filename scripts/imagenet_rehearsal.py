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


def random_weights(path: Path, args: dict[str, Any]) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("vit_base_patch16_224", **args).state_dict(), path)


def main() -> None:
    arguments = rehearsal.arguments(__doc__, images=24, batch_size=4)

    with rehearsal.project(TABLE) as project:
        params = rehearsal.experiment(TABLE)
        classes = rehearsal.lay_out(arguments.folder, project / "data" / "imagenet", arguments.images)
        random_weights(project / "random.safetensors", params["model"]["args"])
        overrides: dict[str, Any] = {
            "data.classes": classes,
            "data.calibration": 8,
            "dense.init": "checkpoint",
            "dense.checkpoint": "random.safetensors",
            "learning.steps": arguments.steps,
            "learning.batch_size": arguments.batch_size,
            "learning.log_every": 1,
            "task.eval_batch_size": 8,
            "runtime.loader_workers": 0,
        }
        trained = [(section, row) for section in ("learned", "finetuned") for row in params[section]]
        overrides |= {f"{section}.{row}.steps": arguments.steps for section, row in trained}
        rehearsal.run(project, rehearsal.overridden(params, overrides, arguments.overrides))
        rehearsal.report(rehearsal.cost(project, list(params["learned"])[-1]), arguments.record)


if __name__ == "__main__":
    main()
