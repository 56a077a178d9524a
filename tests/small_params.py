"""A small valid params file for the tests of the config room, and every key of the format."""

from __future__ import annotations

from typing import Any

import pytest

from maskllm4v.config import parse_experiment
from maskllm4v.utils.errors import ConfigError

TRAINING = [
    *("steps", "epochs", "batch_size", "accumulate", "optimizer", "optimizer_args", "lr", "min_lr", "warmup", "betas"),
    *("weight_decay", "clip_grad", "anneal", "amp", "grad_checkpointing", "channels_last", "compile", "log_every"),
]
LEARNING = [
    *TRAINING,
    *("tau", "scaling", "regularisation", "init", "prior_strength", "gate_std", "hard", "gate", "ema"),
    *("distillation", "distillation_temperature", "select", "inputs"),
]
FINETUNING = [*TRAINING, "start", "ema"]
# Every key of the format, written down a second time.
SECTIONS = {
    "": [
        *("table", "title", "exact", "seeds", "pattern", "data", "task", "model", "dense", "priors", "learning"),
        *("learned", "updated", "finetuned", "rows", "evaluation", "exports", "runtime"),
    ],
    "data": [
        *("name", "source", "root", "dataset", "train", "test", "classes", "masks", "annotations", "ignored"),
        *("zero_is_ignored", "suffix", "image_suffix", "empty_boxes", "hash_files", "in_memory", "holdout"),
        *("test_fraction", "scenes", "split_seed", "calibration", "calibration_seed", "calibration_sets"),
        "calibration_split",
    ],
    "task": [
        *("name", "eval_batch_size", "eval_amp", "eval_split", "shift", "shift_probability", "hflip", "crop_scale"),
        *("crop_ratio", "train_interpolation", "color_jitter", "auto_augment", "random_erasing", "erasing_mode"),
        *("label_smoothing", "mixup", "cutmix", "mix_probability"),
    ],
    "model": ["name", "args", "exclude", "on_misfit", "convolutions", "fused_attention", "stem", "input"],
    "model.stem": ["channels", "strides"],
    "model.input": ["img_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"],
    "dense": [*TRAINING, "row", "init", "checkpoint", "shared", "progressive"],
    "dense.progressive": ["size", "steps"],
    "priors.one": ["method", "pattern", "update_weights", "propagate", "batch_size", "inputs", "permutation"],
    "learning": LEARNING,
    "learned.own": [*LEARNING, "prior", "weights"],
    "updated.better": ["update", "target", "damping", "batch_size", "inputs", "masks"],
    "finetuned.tuned": FINETUNING,
    "exports.own": ["formats", "dtypes"],
    "runtime": [
        *("device", "processes", "loader_workers", "seed_processes", "checkpoint_minutes", "checkpoint_steps", "live"),
    ],
}


def params() -> dict[str, Any]:
    """One row of each kind, but two of them learned, and two fine-tuned: under a mask, and dense."""
    return {
        "table": "t",
        "title": "A table",
        "seeds": [0, 1],
        "data": {"name": "digits", "source": "digits", "holdout": 10},
        "task": {},
        "model": {
            "name": "VisionTransformer",
            "args": {"img_size": 8},
            "stem": {"channels": [4, 8], "strides": [2, 1]},
            "input": {},
        },
        "dense": {"row": "dense", "init": "scratch", "steps": 5, "progressive": {"size": 4, "steps": 3}},
        "priors": {"one": {"method": "magnitude"}},
        "learning": {"lr": 0.5, "steps": 7},
        "learned": {"own": {"prior": "one", "steps": 9, "hard": True}, "plain": {"prior": "one"}},
        "updated": {"better": {"masks": "one", "update": "least_squares"}},
        "finetuned": {"tuned": {"start": "one"}, "more": {"start": "dense", "steps": 4}},
        "rows": {row: row.title() for row in ("dense", "one", "own", "plain", "better", "tuned", "more")},
        "exports": {"own": {}},
        "runtime": {},
    }


def at(raw: dict[str, Any], path: str) -> dict[str, Any]:
    for part in path.split(".") if path else []:
        raw = raw[part]
    return raw


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = params()
    section, _, key = path.rpartition(".")
    at(raw, section)[key] = value
    return raw


def fault(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(raw, "params.yaml")
    return str(caught.value)
