"""Records of a small diffusion experiment, with numbers and pictures made up by a formula; nothing needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.runs.curves import write_curve
from maskllm4v.runs.paths import curve_file, layers_file, picture_file, record_file
from maskllm4v.runs.records import build_record, write_record
from maskllm4v.utils.images import write_picture
from maskllm4v.utils.io import write_csv

HERE = {"hardware": "a machine", "world_size": 1}
TIMESTEPS = (50, 250, 950)
CURVE = ("step", "loss", "max_probability", "off_prior", "flipped", "grad_norm", "kept_energy")


def diffusion(**changes: Any) -> Experiment:
    """A dense row, four one-shot ones and two learned ones."""
    raw = {
        "table": "tiny",
        "title": "A tiny diffusion transformer",
        "seeds": [0, 1],
        "data": {"name": "digits", "source": "digits"},
        "task": {"name": "diffusion"},
        "model": {"name": "DiTTransformer2DModel", "args": {"sample_size": 8}},
        "dense": {"row": "tiny-dense", "init": "scratch", "steps": 5},
        "priors": {
            "tiny-magnitude": {"method": "magnitude"},
            "tiny-wanda": {"method": "wanda"},
            "tiny-sparsegpt": {"method": "sparsegpt"},
            "tiny-sparsegpt-update": {"method": "sparsegpt", "update_weights": True},
        },
        "learned": {
            "tiny-short": {"prior": "tiny-magnitude", "steps": 10},
            "tiny-long": {"prior": "tiny-magnitude", "steps": 30},
        },
        "rows": {
            "tiny-dense": "DiT (dense)",
            "tiny-magnitude": "Magnitude",
            "tiny-wanda": "Wanda",
            "tiny-sparsegpt": "SparseGPT w/o update",
            "tiny-sparsegpt-update": "SparseGPT",
            "tiny-short": "MaskLLM-4V (10 steps)",
            "tiny-long": "MaskLLM-4V (30 steps)",
        },
    }
    return parse_experiment({**raw, **changes}, "params.yaml")


def metrics(experiment: Experiment, row: str, seed: int, judged: bool = True) -> dict[str, float]:
    """Different for each row and seed; without a classifier nothing is judged."""
    number = list(experiment.rows).index(row)
    found = {"eps_mse": 0.05 + 0.01 * number + 0.002 * seed}
    found |= {f"eps_mse/t{t:04d}": found["eps_mse"] * 40 / t for t in TIMESTEPS}
    if experiment.row(row).kind != "dense":
        found |= {"dense_mse": 0.003 * number + 0.0004 * seed}
        found |= {f"dense_mse/t{t:04d}": found["dense_mse"] * 20 / t for t in TIMESTEPS}
    if judged:
        found |= {"accuracy": 90.0 - 3 * number + seed, "fd": 2.5 + number + seed / 4, "kd": 0.0123 * (number + 1)}
    if judged and experiment.row(row).kind == "dense":
        found["judge_accuracy"] = 96.37 + seed
    return found


def picture(experiment: Experiment, row: str) -> np.ndarray:
    """Two by three tiles of 4×4 pixels, a grey of its own each."""
    tiles = 10 * list(experiment.rows).index(row) + 30 * np.arange(6, dtype=np.uint8).reshape(2, 3)
    return np.kron(tiles, np.ones((4, 4))).astype(np.uint8)


def make_records(experiment: Experiment, reports: Path, *, judged: bool = True, pictured: bool = True) -> Path:
    """Write records, diagnostics, pictures and curves of all rows; returns ``reports``."""
    table = experiment.table
    for row in experiment.rows:
        seeds = experiment.row(row).seeds
        record = build_record(
            row=row,
            kind=experiment.row(row).kind,
            settings=experiment.row(row).record_settings(),
            metrics={seed: metrics(experiment, row, seed, judged) for seed in seeds},
            summaries={seed: {} for seed in seeds},
            inputs={"manifest": "ab" * 32, "dense": [f"dense{seed}" for seed in seeds], "masks": []},
            parameters={"dense": 10, "kept": 5, "logits": 0},
            made=HERE,
            evaluated=HERE,
        )
        write_record(record_file(table, row, reports), record)
        write_csv(layers_file(table, row, reports), ("seed", "layer"), [])
        if pictured:
            write_picture(picture_file(table, row, "samples", reports), picture(experiment, row))
        if experiment.row(row).kind == "learned":
            for seed in seeds:
                points = [(step, *(seed + 1 / (step + k) for k in range(1, len(CURVE)))) for step in range(0, 10, 5)]
                write_curve(curve_file(table, row, seed, reports), CURVE, points)
    return reports
