"""The exact tables of ``experiments/``, cut to a few steps and samples: all else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskllm4v.config import Experiment, load_experiment, parse_experiment

# The most that a setting of this name may be, wherever it stands. Amounts only: what is computed stays the same.
CAPS = {
    "steps": 3,  # of trainings and of sampling; the last learning rate and temperature are reached all the same
    "batch_size": 8,
    "eval_batch_size": 64,
    "log_every": 2,
    "calibration": 12,  # not a multiple of the batch
    "conditioning_samples": 12,
    "samples": 10,
    "timesteps": 2,
    "images": 12,
    "holdout": 12,
    "train": 64,  # of scenes
    "test": 18,
}
SCENES = {**CAPS, "batch_size": 4, "calibration": 6, "holdout": 6, "test": 9}  # four times the tokens of a digit
TEST_FRACTION = 0.01  # of the digits, stratified: 18 images
PICTURES = 4
# What is not exported. ONNX: tracing takes as long as ten trainings, and the weights are those of the other files (when
# it was tried, all bytes were equal). fp16: QEMU 7.2 flushes subnormal results of conversions to float16 where those of
# arithmetic are flushed, as in exact runs; no CPU does (VCVTPS2PH ignores MXCSR.FTZ).
UNWRITTEN = ("onnx", "fp16")


def exact_tables(root: Path) -> dict[str, Experiment]:
    """All experiments with ``exact: true``, by their tables' names."""
    found = [load_experiment(path) for path in sorted((root / "experiments").glob("*.yaml"))]
    return {experiment.table: experiment for experiment in found if experiment.exact}


def shortened(experiment: Experiment) -> Experiment:
    """The same experiment with one seed and small amounts, see :data:`CAPS`."""
    made = experiment.data.source == "scenes"
    caps = SCENES if made else CAPS
    raw: dict[str, Any] = _capped(experiment.model_dump(mode="json"), caps)
    raw["seeds"] = raw["seeds"][:1]
    if made:  # not written where they are at their defaults
        raw["data"]["scenes"] = _capped(experiment.data.scenes.model_dump(mode="json"), caps)
    raw["data"]["test_fraction"] = min(raw["data"]["test_fraction"], TEST_FRACTION)
    if grid := raw["evaluation"].get("grid"):
        raw["evaluation"]["grid"] = grid[:PICTURES]
    for export in raw["exports"].values():
        export["formats"] = [name for name in export["formats"] if name not in UNWRITTEN] or export["formats"]
        export["dtypes"] = [name for name in export["dtypes"] if name not in UNWRITTEN] or ["fp32"]
    raw["runtime"] |= {
        "device": "cpu",
        "seed_processes": 1,
        "loader_workers": 0,
        "checkpoint_minutes": 0,
        "live": False,
    }
    return parse_experiment(raw, f"{experiment.table}, cut short")


def _capped(value: Any, caps: Mapping[str, int], key: str = "") -> Any:
    if isinstance(value, dict):
        if value.get("update") == "none":  # takes no amounts
            return value
        if value.get("epochs") is not None:
            value = {**value, "epochs": None, "steps": caps["steps"]}
        return {name: _capped(inner, caps, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_capped(inner, caps) for inner in value]
    return min(value, caps[key]) if key in caps and type(value) is int else value
