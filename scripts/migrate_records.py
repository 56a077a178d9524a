"""Bring records of older formats up to date: what they hold of the settings is said anew, what was measured stays.

Every format but the present one has a step that leads to the next; a record goes through all that it needs. A step
tells what it has to know of its time, such as the defaults then, for those of today may be others. ``dvc.lock`` gets
the new digests of records and of folders that hold some, where it had the old ones; no stage runs again.

    python -m scripts.migrate_records          all records below reports/, or none if one cannot be read
    python -m scripts.migrate_records --check  only say which are of an older format; exit status 1 if there are any
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maskllm4v.receipts.locks import lock_files
from maskllm4v.runs.paths import REPORTS
from maskllm4v.runs.records import FORMAT, sealed
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import json_text, read_json, value_digest, write_text
from scripts.lock_entries import dvc_entry

Record = dict[str, Any]
# An entry of deps or outs; DVC puts a long path on a line of its own.
ENTRY = re.compile(r"(?P<head>^    - path:\s+(?P<path>\S+)\n)(?P<facts>(?:      \w+: \S+\n)+)", re.MULTILINE)
FORM = {"format", "settings", "settings_digest"}  # what a step may change of a record, besides its own digest

# The defaults of all settings in the time of format 2, by section.
INPUT: Record = dict.fromkeys(("img_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"))
SAMPLING: Record = {"sampler": "ddpm", "steps": 250, "guidance": 4.0, "guided_channels": None, "clip": False}
TRAINING: Record = {
    **{"steps": None, "epochs": None, "batch_size": 128, "accumulate": 1, "optimizer": "adamw", "optimizer_args": {}},
    **{"lr": 0.001, "min_lr": 0.0, "warmup": 0.0, "betas": [0.9, 0.999], "weight_decay": 0.01, "clip_grad": 2.0},
    **{"anneal": "step", "amp": "no", "grad_checkpointing": False, "channels_last": False, "compile": False},
    "log_every": 10,
}
DEFAULTS: dict[str, Record] = {
    "data": {
        **{"root": None, "dataset": None, "train": "train", "test": "val", "classes": None, "hash_files": False},
        **{"in_memory": None, "holdout": 0, "test_fraction": 0.5, "split_seed": 0, "calibration": 128},
        **{"calibration_seed": 0, "calibration_sets": 1, "calibration_split": "train"},
    },
    "task classification": {
        **{"label_smoothing": 0.0, "shift": 0, "shift_probability": 1.0, "hflip": 0.0, "crop_scale": None},
        **{"crop_ratio": None, "train_interpolation": None, "color_jitter": 0.4, "auto_augment": None},
        **{"random_erasing": 0.0, "erasing_mode": "const", "mixup": 0.0, "cutmix": 0.0, "mix_probability": 1.0},
        **{"eval_batch_size": 256, "eval_amp": "no", "eval_split": "test"},
    },
    "task diffusion": {
        **{"vae": None, "scheduler": None, "train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001},
        **{"beta_end": 0.02, "hflip": 0.0, "label_dropout": 0.1, "conditioning_samples": 4096},
        **{"bank": {**SAMPLING, "samples": 1024}, "judge": None},
        **{"eval_batch_size": 256, "eval_amp": "no", "eval_split": "test"},
    },
    "model timm": {
        **{"args": {}, "stem": None, "input": INPUT, "exclude": ["head"]},
        **{"on_misfit": "error", "fused_attention": True},
    },
    "model DiT": {
        **{"args": {}, "adaln": True, "exclude": [], "on_misfit": "error", "freq_shift": 0, "fused_attention": True},
    },
    "dense": {
        **{**TRAINING, "batch_size": 64, "warmup": 0.1, "weight_decay": 0.05, "clip_grad": 1.0, "log_every": 50},
        **{"checkpoint": None, "shared": False, "progressive": None},
    },
    "prior": {"pattern": None, "update_weights": False, "propagate": None, "batch_size": 128},
    "learning": {
        **{**TRAINING, "min_lr": 0.0001, "tau": [4.0, 0.05], "scaling": [10.0, 100.0], "regularisation": 1e-05},
        **{"init": "prior", "prior_strength": 3.0, "gate_std": 0.2, "hard": False, "ema": 0.0, "distillation": 0.0},
        **{"distillation_temperature": 2.0, "select": "last"},
    },
    "update": {"target": "asymmetric", "damping": 0.1, "batch_size": 128},
    "update sparsegpt": {"target": "symmetric", "damping": 0.01, "batch_size": 128},
    "finetuning": {**TRAINING, "ema": 0.0},
    "evaluation": {**SAMPLING, "images": 0, "timesteps": 10, "samples": 0, "grid": None, "columns": 4},
}


def without_defaults(record: Record) -> Record:
    """From format 2 to 3: settings at their defaults are not written down any more."""
    return {**record, "settings": {key: _sparse(key, value) for key, value in record["settings"].items()}}


def _sparse(key: str, value: Any) -> Any:
    """A section without its defaults; any other value as it is."""
    if key == "start":
        return {inner: _sparse(inner, section) for inner, section in value.items()}
    if key == "task":
        key = f"task {value['name']}"
    elif key == "model":
        key = f"model {'DiT' if value['name'] == 'DiTTransformer2DModel' else 'timm'}"
    elif key == "update" and value["update"] == "sparsegpt":
        key = "update sparsegpt"
    if key not in DEFAULTS:
        return value
    found = _beyond(value, DEFAULTS[key])
    if found.get("judge"):
        judge = value["judge"]
        task, model = _sparse("task", judge["task"]), _sparse("model", judge["model"])
        found["judge"] = {"task": task, "model": model, "training": _beyond(judge["training"], TRAINING)}
        if len(task) == 1:  # its name alone: all of it is at its default
            del found["judge"]["task"]
    return found


def _beyond(section: Record, defaults: Record) -> Record:
    found = {key: value for key, value in section.items() if key not in defaults or value != defaults[key]}
    parts = {key: defaults[key] for key in ("bank", "input") if key in found}
    return {**found, **{key: _beyond(found[key], part) for key, part in parts.items()}}


def with_digest(record: Record) -> Record:
    """From format 3 to 4: a digest of the record's own content, which every migration writes anew."""
    return record


STEPS: dict[int, Callable[[Record], Record]] = {2: without_defaults, 3: with_digest}  # by the format each starts from


def migrated(record: Record, path: Path) -> Record:
    """A record in the present format.

    Raises:
        UserError: it was edited, or no step leads from its format.
    """
    found = record
    if value_digest(found["settings"]) != found["settings_digest"]:
        raise UserError(f"{path}: settings and their digest disagree; the record was edited")
    while found["format"] != FORMAT:
        if found["format"] not in STEPS:
            raise UserError(f"{path} has format {found['format']}, from which no way leads to {FORMAT}")
        found = STEPS[found["format"]](found) | {"format": found["format"] + 1}
        found["settings_digest"] = value_digest(found["settings"])
    measured = ({key: one[key] for key in one.keys() - FORM - {"digest"}} for one in (record, found))
    assert next(measured) == next(measured)
    return sealed(found)


def outdated(root: Path) -> dict[Path, str]:
    """What records that are not of the present format have to become, by path below the root.

    Raises:
        UserError: one of them is damaged or was edited, or no step leads from its format.
    """
    texts = {}
    for path in sorted((root / REPORTS).glob("*/runs/*/evaluation/record.json")):
        record, name = read_json(path), path.relative_to(root)
        if not isinstance(record, dict) or not {"metrics", *FORM} <= record.keys():
            raise UserError(f"{name} is not a record")
        if record["format"] != FORMAT:
            texts[name] = json_text(migrated(record, name))
    return texts


def relocked(root: Path, lock: str, texts: Mapping[Path, str]) -> str:
    """``dvc.lock`` with the new digests of records, and of folders above them, in the place of the old ones.

    An entry that does not say what lies there now stays: its stage has to run anyway.
    """
    above = {folder.as_posix() for path in texts for folder in (path, *path.parents)}
    known: dict[str, tuple[Record, Record]] = {}

    def renewed(entry: re.Match[str]) -> str:
        if (path := entry["path"]) not in above:
            return entry[0]
        if path not in known:
            known[path] = (dvc_entry(root, path, {}), dvc_entry(root, path, texts))
        old, new = known[path]
        said = [line.strip().split(": ") for line in entry["facts"].splitlines()]
        if any([key, str(value)] not in said for key, value in old.items()):
            return entry[0]
        return entry["head"] + "".join(f"      {key}: {new.get(key, value)}\n" for key, value in said)

    return ENTRY.sub(renewed, lock)


def migrate(root: Path) -> list[Path]:
    """Bring all records below ``reports/`` up to date, and ``dvc.lock`` with them; returns the paths of those it wrote.

    Each file is written whole or not at all, ``dvc.lock`` first, so that after an interruption a second call does the
    rest.

    Raises:
        UserError: a record cannot be migrated; then none is.
    """
    texts = outdated(root)
    for lock in lock_files(root) if texts else ():
        text = lock.read_text(encoding="utf-8")
        if (changed := relocked(root, text, texts)) != text:
            write_text(lock, changed)
    for path, text in texts.items():
        write_text(root / path, text)
    return list(texts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.migrate_records", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; end with status 1 if a record is older")
    arguments = parser.parse_args()
    try:
        found = list(outdated(Path())) if arguments.check else migrate(Path())
    except UserError as error:
        sys.exit(f"migrate_records: {error}")
    for path in found:
        print(path)
    print(f"{len(found)} records {'are not of' if arguments.check else 'were brought to'} format {FORMAT}")
    if arguments.check and found:
        sys.exit(1)


if __name__ == "__main__":
    main()
