"""Records as ``evaluate`` and the training stages write them, with numbers made up by a formula."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from import_graph import ROOT

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.runs.curves import write_curve
from maskllm4v.runs.paths import curve_file, layers_file, record_file
from maskllm4v.runs.records import build_record, write_record
from maskllm4v.training import finetuning, mask_learning
from maskllm4v.utils.io import write_csv

DIGITS = load_experiment(ROOT / "params.yaml")
HERE = {"hardware": "a machine", "world_size": 1}


def with_controls(experiment: Experiment = DIGITS, **changes: object) -> Experiment:
    """The experiment with two fine-tuned rows: dense, and under the magnitude mask."""
    raw = experiment.model_dump()
    starts = {"digits-dense-more": "digits-dense", "digits-magnitude-more": "digits-magnitude"}
    raw["finetuned"] = {row: {"start": start, "steps": 200} for row, start in starts.items()}
    raw["rows"] |= {row: f"Trained on: {start}" for row, start in starts.items()}
    return Experiment.model_validate({**raw, **changes})


def metrics(experiment: Experiment, row: str, seed: int) -> dict[str, float]:
    """Different for each row and seed, and spread differently."""
    number = list(experiment.rows).index(row)
    found = {
        "top1": 80.0 + number + 0.5 * seed * (1 + number % 3),
        "top5": 99.0 + 0.1 * seed,
        "nll": 0.5 - 0.01 * number + 0.02 * seed,
        "ece": 5.0 - 0.25 * number - seed,
    }
    return found if experiment.row(row).kind == "dense" else {**found, "agreement": 90.0 + number / 8 + seed}


def make_records(experiment: Experiment, reports: Path, rows: Iterable[str] | None = None) -> Path:
    """Write records, diagnostics and curves of some rows, by default all; returns ``reports``."""
    for row in experiment.rows if rows is None else rows:
        kind, seeds = experiment.row(row).kind, experiment.row(row).seeds
        measured = {seed: metrics(experiment, row, seed) for seed in seeds}
        record = build_record(
            row=row,
            kind=kind,
            settings=experiment.row(row).record_settings(),
            metrics=measured,
            summaries={seed: {"top1": values["top1"]} for seed, values in measured.items()},
            inputs={"manifest": "ab" * 32, "dense": [f"dense{seed}" for seed in seeds], "masks": []},
            parameters={"dense": 10, "kept": 5, "logits": 0},
            made=HERE,
            evaluated=HERE,
        )
        write_record(record_file(experiment.table, row, reports), record)
        write_csv(layers_file(experiment.table, row, reports), ("seed", "layer"), [])
        if kind in ("learned", "finetuned"):
            columns = mask_learning.CURVE_COLUMNS if kind == "learned" else finetuning.CURVE_COLUMNS
            steps = (experiment.learned if kind == "learned" else experiment.finetuned)[row].steps or 0
            for seed in seeds:
                points = [
                    (step, *(seed + 1 / (step + k) for k in range(1, len(columns))))
                    for step in [*range(0, steps, 10), steps - 1]
                ]
                write_curve(curve_file(experiment.table, row, seed, reports), columns, points)
    return reports
