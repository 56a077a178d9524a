"""Switch params.yaml to one of experiments/*.yaml, and dvc.lock to its stages."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from maskllm4v.config import PARAMS, Experiment, load_experiment
from maskllm4v.receipts.locks import activate
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.io import file_digest

KEPT = Path(".cache/params")  # git-ignored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="name of a file in experiments/, without .yaml")


def run(a: argparse.Namespace) -> None:
    source = Path("experiments") / f"{a.experiment}.yaml"
    if not source.exists():
        names = ", ".join(sorted(path.stem for path in Path("experiments").glob("*.yaml")))
        raise ConfigError(f"no experiment {a.experiment!r}; allowed: {names}")
    experiment = load_experiment(source)
    if missing := _read_by_dvc(experiment):
        raise ConfigError(f"{source}: dvc.yaml reads these, too, so they have to stand there: {'; '.join(missing)}")
    _keep_edits()
    activate(Path(), source)
    print(f"params.yaml is now {source}; run `dvc repro`")


def _keep_edits() -> None:
    """Copy a ``params.yaml`` that is none of ``experiments/``: there may be no other copy."""
    experiments = Path("experiments").glob("*.yaml")
    if not PARAMS.exists() or PARAMS.read_bytes() in {path.read_bytes() for path in experiments}:
        return
    copy = KEPT / f"{file_digest(PARAMS)[:12]}.yaml"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PARAMS, copy)
    print(f"params.yaml held edits of your own; they are kept in {copy}")


def _read_by_dvc(experiment: Experiment) -> list[str]:
    """What an experiment leaves out to take its default, as lines to add: DVC knows no defaults."""
    found = []
    for key, field in Experiment.model_fields.items():
        if key not in experiment.model_fields_set and key != "runtime":
            plain = isinstance(field.default, str | int)
            found.append(f"{key}: {json.dumps(field.default) if plain else '{}'}")
    if "name" not in experiment.task.model_fields_set:
        found.append(f"name: {experiment.task.name} in task")
    return found
