"""Where the dense model comes from: trained here, read from a file, or pretrained through timm."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from maskllm4v.checkpoints import load_plain_state, load_state
from maskllm4v.config import DenseSettings, Experiment
from maskllm4v.errors import ConfigError
from maskllm4v.finite import FiniteLoss
from maskllm4v.models import build_model
from maskllm4v.progress import bar
from maskllm4v.randomness import seeded_steps
from maskllm4v.schedule import cosine, warm_up
from maskllm4v.tasks import Task


def obtain_dense(experiment: Experiment, task: Task, seed: int, position: int = 0) -> nn.Module:
    """The dense model of one seed, as ``experiment.dense`` says.

    Raises:
        ConfigError: several seeds for a model that has none.
        CheckpointError: the file is missing, damaged or does not fit.
        TrainingError: training from scratch diverged.
    """
    settings = experiment.dense
    if settings.init == "scratch":
        model = task.build_model(seed)
        train_dense(model, task, settings, seed=seed, position=position)
        return model
    if settings.init == "pretrained":
        return build_model(experiment.model, seed, pretrained=True)
    if settings.checkpoint is None:
        raise ConfigError("dense.checkpoint is missing, which init 'checkpoint' needs")
    model = task.build_model(seed)
    load_state(model, load_plain_state(Path(settings.checkpoint)), settings.checkpoint)
    return model


def train_dense(model: nn.Module, task: Task, settings: DenseSettings, *, seed: int, position: int = 0) -> None:
    """Train a model from its initial weights, in place: AdamW, warm-up, cosine to zero.

    Raises:
        TrainingError: the loss is not finite; names the step.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    warmup_steps = round(settings.warmup * settings.steps)
    batches = task.train_batches(seed=seed, batch_size=settings.batch_size, steps=settings.steps)
    finite = FiniteLoss(next(model.parameters()).device)
    model.train()
    with seeded_steps(next(model.parameters()).device, seed) as seed_step:
        for step, batch in enumerate(bar(batches, f"dense, seed {seed}", total=settings.steps, position=position)):
            seed_step(step)
            lr = cosine(settings.lr, 0.0, step / settings.steps) * warm_up(step, warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = task.loss(task.forward(model, batch), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad or float("inf"))
            optimizer.step()
            finite.watch(step, loss, norm)
            if step % 50 == 0 or step == settings.steps - 1:
                finite.check(settings.row, seed)
    model.eval()
