"""Where the dense model comes from: trained here, read from a file, or pretrained through timm; and its judge."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from maskllm4v.checkpoints.masks import load_state
from maskllm4v.config import DenseSettings
from maskllm4v.tasks.base import JudgeTraining, Task
from maskllm4v.training.finetuning import WeightLearner, train_dense
from maskllm4v.training.resume import Resume
from maskllm4v.training.trainer import run
from maskllm4v.utils.errors import ConfigError


def obtain_dense(
    settings: DenseSettings, task: Task, seed: int, position: int = 0, resume: Resume | None = None
) -> nn.Module:
    """The dense model of one seed, as the settings say.

    Raises:
        ConfigError: the checkpoint's name is missing, or the model has no pretrained weights.
        CheckpointError: the file is missing, damaged or does not fit.
        TrainingError: training from scratch diverged.
    """
    if settings.init == "scratch":
        model = task.build_model(seed)
        train_dense(model, task, settings, seed=seed, position=position, resume=resume)
        return model
    if settings.init == "pretrained":
        return task.build_model(seed, pretrained=True)
    if settings.checkpoint is None:
        raise ConfigError("dense.checkpoint is missing, which init 'checkpoint' needs")
    model = task.build_model(seed)
    load_state(model, task.read_weights(Path(settings.checkpoint)), settings.checkpoint)
    return model


def train_judge(judge: JudgeTraining, seed: int) -> nn.Module:
    """The classifier that judges samples, trained from its initial weights.

    Raises:
        TrainingError: the loss is not finite; names the step.
    """
    model = judge.task.build_model(seed)
    run(WeightLearner(model, judge.task, judge.settings, row="judge"), judge.task, judge.settings, seed=seed)
    return model
