"""What rehearsals share: a temporary copy of the project, an experiment with values overridden, ``dvc repro``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ("maskllm4v", "stages", "experiments", ".dvcignore", ".gitignore")


def arguments(description: str | None, *, images: int, batch_size: int) -> argparse.Namespace:
    """What a person says, or these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write speed and memory to this JSON file")
    parser.add_argument("overrides", nargs="*", help="further key=value pairs, e.g. learning.amp=no")
    return parser.parse_args()


@contextmanager
def project(table: str) -> Iterator[Path]:
    """A copy of the project without results, whose README shows one table."""
    with TemporaryDirectory(prefix="rehearsal-") as name:
        folder = Path(name)
        for item in PROJECT:
            copy = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
            copy(ROOT / item, folder / item)
        for name in ("benchmarks", "receipts"):
            (folder / "reports" / name).mkdir(parents=True)
        (folder / "dvc.yaml").write_text(dvc_file(table))
        (folder / "README.md").write_text(f"<!-- {table} -->\n<!-- /{table} -->\n")
        (folder / "docs").mkdir()
        (folder / "docs/findings.md").touch()
        yield folder


def dvc_file(table: str) -> str:
    """``dvc.yaml`` of a project with one table, whose README and list of tables depend on no other's records."""
    text = (ROOT / "dvc.yaml").read_text()
    return re.sub(r"(?: +- reports/\w+/runs\n)+", f"      - reports/{table}/runs\n", text)


def experiment(table: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "experiments" / f"{table}.yaml").read_text())
    return found


def jpegs(source: Path, count: int) -> list[Path]:
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))[:count]
    if not images:
        sys.exit(f"{source} holds no JPEG")
    return images


def lay_out(source: Path, target: Path, count: int) -> int:
    """Link ``count`` images as ``train`` and ``val`` class folders; returns the number of classes."""
    images = jpegs(source, count)
    for split in ("train", "val"):
        for image in images:
            folder = target / split / image.name.partition("_")[0]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / image.name).symlink_to(image.resolve())
    return len(list((target / "train").iterdir()))


def lengths(params: dict[str, Any], steps: int, steps_per_epoch: float) -> dict[str, Any]:
    """What makes each training of an experiment so many steps long, in its own unit, which rows' labels may name."""
    units = {"steps": steps, "epochs": steps / steps_per_epoch}
    trainings = {"dense": params["dense"], "learning": params["learning"]}
    trainings |= {f"{kind}.{row}": own for kind in ("learned", "finetuned") for row, own in params[kind].items()}
    return {f"{where}.{unit}": units[unit] for where, own in trainings.items() for unit in units if unit in own}


def overridden(params: dict[str, Any], overrides: dict[str, Any], texts: Sequence[str] = ()) -> dict[str, Any]:
    """A copy with the values at dotted keys replaced; a key that is not there yet is a value at its default.

    Args:
        params: of an experiment.
        overrides: values by dotted key.
        texts: further ``key=value`` pairs, as a person types them.
    """
    params = json.loads(json.dumps(params))
    typed = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}
    for key, value in {**overrides, **typed}.items():
        *path, last = key.split(".")
        section = params
        for part in path:
            section = section.setdefault(part, {})
        section.pop({"steps": "epochs"}.get(last, ""), None)  # a budget has one unit
        section[last] = value
    return params


def run(folder: Path, params: dict[str, Any]) -> None:
    """Every stage of a project, in place; prints its table."""
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "repro"]):
        subprocess.run(command, cwd=folder, env=environment, check=True)
    print((folder / "reports" / params["table"] / "table.md").read_text())


def cost(folder: Path, row: str) -> dict[str, Any]:
    """Speed and memory of a row's training, with its batch size, precision and hardware."""
    found: dict[str, Any] = json.loads((folder / ".cache" / "timings" / f"{row}-seed0.json").read_text())
    made = json.loads((folder / "artifacts" / row / "made.json").read_text())
    learning = made["settings"]["learning"]
    return {
        **found,
        **{key: learning[key] for key in ("batch_size", "amp", "steps")},
        "hardware": made["hardware"],
        "model": made["settings"]["model"]["name"],
    }


def report(found: dict[str, Any], record: Path | None) -> None:
    """Print facts, and write them to a JSON file if one is named."""
    print(json.dumps(found, indent=2))
    if record:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
