"""Measuring one model: metrics, parameter counts and per-layer diagnostics."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskllm4v.checkpoints.apply import overlay, permute
from maskllm4v.checkpoints.masks import load_dense, load_masks
from maskllm4v.config import Experiment
from maskllm4v.evaluation.layer_errors import layer_diagnostics
from maskllm4v.runs.makers import check_inputs
from maskllm4v.sparsity.parameterization import gate_of
from maskllm4v.sparsity.parameters import find_matrix
from maskllm4v.sparsity.surgery import fold_
from maskllm4v.tasks.base import Task


@dataclass(frozen=True)
class Measured:
    """What one seed of a row gives.

    Attributes:
        metrics: by name, from the task.
        summary: the same in the original's form; empty where it has none.
        layers: rows of :data:`maskllm4v.evaluation.layer_errors.COLUMNS`.
        parameters: counts: of the dense model, kept after pruning, of logits that were trained.
        dense, masks: digests of the tensors evaluated; no masks for the dense row.
        pictures: what shows the model at work, uint8 ``[H, W, 3]`` or ``[H, W]`` by file stem; the first seed's alone.
        weight: the dense one ``[out, in]`` of the first of ``layers``, as its mask lies on it; the first seed's alone.
    """

    metrics: dict[str, float]
    summary: dict[str, Any]
    layers: list[tuple[str, str, str, str]]
    parameters: dict[str, int]
    dense: str
    masks: str | None
    pictures: dict[str, np.ndarray]
    weight: np.ndarray | None = None


def measure(
    experiment: Experiment,
    task: Task,
    seed: int,
    dense: Path,
    masks: Path | None,
    pattern: str | None = None,
    row: str | None = None,
) -> Measured:
    """Evaluate the dense model, or the same model under the masks (and updated weights) of a file.

    Raises:
        CheckpointError: a file is missing, damaged, or belongs to another model, pattern or ``row`` (None: of any).
    """
    model = task.build_model(seed)
    base = load_dense(dense, model, experiment.model.name)
    total = sum(parameter.numel() for parameter in model.parameters())
    first = seed == experiment.seeds[0]
    if masks is None:
        if row is not None:
            check_inputs(experiment, seed, base)
        metrics = task.evaluate(model)
        counts = {"dense": total, "kept": total, "logits": 0}
        pictures = task.pictures(model) if first else {}
        return Measured(metrics, task.summary(model, metrics, 0), [], counts, base, None, pictures)
    found = load_masks(masks, pattern=pattern, base=base)
    if row is not None:
        check_inputs(experiment, seed, base, row, found.digest)
    permute(model, found, str(masks))  # it gives the same outputs; the layers' errors are measured against it
    layers = layer_diagnostics(model, found, task.calibration(experiment.task.eval_batch_size, seed))
    sparse = fold_(overlay(copy.deepcopy(model), found))
    metrics = task.evaluate(sparse, dense=model)
    pruned = sum(int((~mask).sum()) for mask in found.masks.values())
    logits = 0
    if found.method == "maskllm" and found.pattern is not None:
        groups = sum(mask.numel() // found.pattern.m for mask in found.masks.values())
        logits = groups * gate_of(found.gate, found.pattern).logits
    counts = {"dense": total, "kept": total - pruned, "logits": logits}
    summary, pictures = task.summary(model, metrics, logits), task.pictures(sparse) if first else {}
    weight = None
    if first and layers:
        weight = find_matrix(model, layers[0][0]).rows.detach().flatten(0, -2).float().cpu().numpy()
    return Measured(metrics, summary, layers, counts, base, found.digest, pictures, weight)
