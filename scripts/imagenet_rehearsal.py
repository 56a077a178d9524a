"""Every row of the ImageNet table, from end to end, on a handful of JPEGs and a few steps: a rehearsal.

    python scripts/imagenet_rehearsal.py FOLDER [--images 24] [--batch-size 4] [--steps 2] [key=value ...]

FOLDER holds images whose names begin with their class, ``n01440764_tench.JPEG``, or class folders of such.
They are laid out as ImageNet is, in a temporary copy of the project; ``params.yaml`` is
``experiments/imagenet_vit_b16.yaml`` with nothing but values overridden, a ViT-B/16 gets random weights,
and ``dvc repro`` runs prepare, dense, priors, masks, controls, evaluation, report and MLflow. Accuracies mean nothing;
speed and memory of the mask-learning step are printed, and written to a JSON file if asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments" / "imagenet_vit_b16.yaml"
PROJECT = ("maskllm4v", "stages", "experiments", "dvc.yaml", ".dvcignore", ".gitignore")


def lay_out(source: Path, target: Path, count: int) -> int:
    """Link ``count`` images as ``train`` and ``val`` class folders; returns the number of classes."""
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))[:count]
    if not images:
        sys.exit(f"{source} holds no JPEG")
    for split in ("train", "val"):
        for image in images:
            folder = target / split / image.name.partition("_")[0]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / image.name).symlink_to(image.resolve())
    return len(list((target / "train").iterdir()))


def overridden(params: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy with the values at dotted keys replaced; a key that is not there yet is a value at its default."""
    params = json.loads(json.dumps(params))
    for key, value in overrides.items():
        *path, last = key.split(".")
        section = params
        for part in path:
            section = section.setdefault(part, {})
        section.pop({"steps": "epochs"}.get(last, ""), None)  # a budget has one unit
        section[last] = value
    return params


def random_weights(path: Path, args: dict[str, Any]) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("vit_base_patch16_224", **args).state_dict(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write speed and memory to this JSON file")
    parser.add_argument("overrides", nargs="*", help="further key=value pairs, e.g. learning.amp=no")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        project = Path(name)
        for item in PROJECT:
            copy = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
            copy(ROOT / item, project / item)
        (project / "reports" / "benchmarks").mkdir(parents=True)
        (project / "README.md").write_text("<!-- imagenet_vit_b16 -->\n<!-- /imagenet_vit_b16 -->\n")
        classes = lay_out(arguments.folder, project / "data" / "imagenet", arguments.images)
        params = yaml.safe_load(EXPERIMENT.read_text())
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
        overrides |= {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in arguments.overrides)}
        (project / "params.yaml").write_text(yaml.safe_dump(overridden(params, overrides), sort_keys=False))
        rehearse(project)
        print((project / "reports" / params["table"] / "table.md").read_text())
        row = list(params["learned"])[-1]
        cost = json.loads((project / ".cache" / "timings" / f"{row}-seed0.json").read_text())
        made = json.loads((project / "artifacts" / row / "made.json").read_text())
        cost |= {"batch_size": made["settings"]["learning"]["batch_size"], "amp": made["settings"]["learning"]["amp"]}
        cost |= {"hardware": made["hardware"], "steps": arguments.steps, "model": params["model"]["name"]}
        print(json.dumps(cost, indent=2))
        if arguments.record:
            arguments.record.parent.mkdir(parents=True, exist_ok=True)
            arguments.record.write_text(json.dumps(cost, indent=2, sort_keys=True) + "\n")


def rehearse(project: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "repro"]):
        subprocess.run(command, cwd=project, env=environment, check=True)


if __name__ == "__main__":
    main()
