"""DiT-XL/2 in its real size, from end to end, on a handful of JPEGs and a step or two: a rehearsal.

    python scripts/dit_xl2_rehearsal.py FOLDER [--images 8] [--batch-size 1] [--steps 2] [key=value ...]

FOLDER holds JPEGs of any kind, which are laid out as 1,000 classes of one image each, in a temporary copy of the
project; ``params.yaml`` is ``experiments/dit_xl2_256.yaml`` with nothing but values overridden. A DiT-XL/2 and an
autoencoder of Stable Diffusion's size get random weights and are saved as diffusers does, and ``dvc repro`` runs
prepare, dense, priors, masks learned with and without data, sampling, report and MLflow. Pictures and errors mean
nothing; speed and memory are printed, and written to a JSON file if asked for. Needs 24 GB of memory and 40 GB of disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rehearsal

TABLE = "dit_xl2_256"
AUTOENCODER = {  # of Stable Diffusion, which DiT uses
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


def random_weights(folder: Path, args: dict[str, Any]) -> None:
    """A diffusers folder: ``transformer/``, ``vae/``, ``scheduler/``."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    DiTTransformer2DModel(**args).save_pretrained(folder / "transformer", max_shard_size="20GB")
    AutoencoderKL(**AUTOENCODER).save_pretrained(folder / "vae")
    DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).save_pretrained(folder / "scheduler")


def lay_out(source: Path, target: Path, count: int, classes: int) -> None:
    """Link ``count`` images in turn, as the one image of each class of ``train`` and ``val``."""
    images = rehearsal.jpegs(source, count)
    for split in ("train", "val"):
        for number in range(classes):
            folder = target / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / "image.JPEG").symlink_to(images[number % len(images)].resolve())


def main() -> None:
    arguments = rehearsal.arguments(__doc__, images=8, batch_size=1)

    with rehearsal.project(TABLE) as project:
        params = rehearsal.experiment(TABLE)
        lay_out(arguments.folder, project / "data" / "imagenet", arguments.images, params["data"]["classes"])
        random_weights(project / "data" / "DiT-XL-2-256", params["model"]["args"])
        overrides: dict[str, Any] = {
            "data.calibration": 2,
            "task.bank": {"samples": arguments.batch_size, "sampler": "ddim", "steps": 1, "guidance": 1.5},
            "learning.steps": arguments.steps,
            "learning.batch_size": arguments.batch_size,
            "learning.accumulate": 1,
            "learning.log_every": 1,
            "evaluation.steps": 2,
            "evaluation.images": 1,
            "evaluation.timesteps": 1,
            "evaluation.grid": [0],
            "evaluation.columns": 1,
            "runtime.loader_workers": 0,
        }
        rehearsal.run(project, rehearsal.overridden(params, overrides, arguments.overrides))
        rehearsal.report(rehearsal.cost(project, next(iter(params["learned"]))), arguments.record)


if __name__ == "__main__":
    main()
