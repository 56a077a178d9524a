"""Measuring one model: metrics, parameter counts and per-layer diagnostics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from maskllm4v.checkpoints import MaskCheckpoint, load_dense, load_masks
from maskllm4v.config import Experiment
from maskllm4v.diagnostics import layer_diagnostics
from maskllm4v.errors import CheckpointError
from maskllm4v.surgery import apply_masks_, fold_, linear
from maskllm4v.tasks import Task


@dataclass(frozen=True)
class Measured:
    """What one seed of a row gives.

    Attributes:
        metrics: by name, from the task.
        layers: rows of :data:`maskllm4v.diagnostics.COLUMNS`.
        parameters: counts: of the dense model, kept after pruning, of logits that were trained.
        dense, masks: digests of the tensors evaluated; no masks for the dense row.
    """

    metrics: dict[str, float]
    layers: list[tuple[str, str, str, str]]
    parameters: dict[str, int]
    dense: str
    masks: str | None


def measure(experiment: Experiment, task: Task, seed: int, dense: Path, masks: Path | None) -> Measured:
    """Evaluate the dense model, or the same model under the masks (and updated weights) of a file.

    Raises:
        CheckpointError: a file is missing, damaged, or belongs to another model.
    """
    model = task.build_model(seed)
    base = load_dense(dense, model, experiment.model.name)
    total = sum(parameter.numel() for parameter in model.parameters())
    if masks is None:
        counts = {"dense": total, "kept": total, "logits": 0}
        return Measured(task.evaluate(model), [], counts, base, None)
    found = load_masks(masks, pattern=experiment.pattern, base=base)
    _check_fits(model, found, str(masks))
    batches = task.calibration_batches(experiment.task.eval_batch_size)
    layers = layer_diagnostics(model, found, task, batches)
    install(model, found, str(masks))
    fold_(model)
    pruned = sum(int((~mask).sum()) for mask in found.masks.values())
    groups = sum(mask.numel() // found.pattern.m for mask in found.masks.values())
    logits = groups * found.pattern.num_candidates if found.method == "maskllm" else 0
    counts = {"dense": total, "kept": total - pruned, "logits": logits}
    return Measured(task.evaluate(model), layers, counts, base, found.digest)


def install(model: nn.Module, checkpoint: MaskCheckpoint, origin: str) -> None:
    """Put a checkpoint's updated weights and masks into a dense model, in place.

    Raises:
        CheckpointError: a layer is missing or has another shape.
    """
    _check_fits(model, checkpoint, origin)
    for name, weight in checkpoint.weights.items():
        linear(model, name).weight.data.copy_(weight)
    apply_masks_(model, checkpoint.masks, checkpoint.pattern)


def _check_fits(model: nn.Module, checkpoint: MaskCheckpoint, origin: str) -> None:
    modules = dict(model.named_modules())
    for name, mask in checkpoint.masks.items():
        layer = modules.get(name)
        shapes = {mask.shape, checkpoint.weights[name].shape if name in checkpoint.weights else mask.shape}
        if not isinstance(layer, nn.Linear) or shapes != {layer.weight.shape}:
            raise CheckpointError(f"{origin}: layer {name!r} does not fit the model")
