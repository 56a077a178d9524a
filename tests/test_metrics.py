"""What tasks measure: the columns, and names of metrics by timestep."""

from __future__ import annotations

import dataclasses

import pytest

from maskllm4v.config.metrics import TaskMetrics
from maskllm4v.config.tasks import task_names, task_sections
from maskllm4v.reporting.metrics import by_timestep, metrics_of
from maskllm4v.utils.errors import ConfigError

EACH = pytest.mark.parametrize("task", [metrics_of(name) for name in task_names()], ids=task_names())


def test_a_task_without_metrics_makes_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    without = dataclasses.replace(task_sections("classification"), metrics=None)
    monkeypatch.setattr("maskllm4v.reporting.metrics.task_sections", lambda name: without)
    with pytest.raises(ConfigError, match=r"tasks/ranking/settings.py: SECTIONS has no metrics"):
        metrics_of("ranking")


def test_classification_shows_accuracy_first() -> None:
    task = metrics_of("classification")
    assert [(metric.header, metric.digits) for metric in task.columns] == [
        ("Top-1 (%)", 2),
        ("Top-5 (%)", 2),
        ("Cross-entropy", 3),
        ("ECE (%)", 1),
        ("Agreement (%)", 1),
    ]
    assert (task.headline.name, task.better) == ("top1", "higher")
    assert (task.headline.in_sentences, task.headline.on_axes) == ("top-1", "top-1 accuracy (%)")


def test_diffusion_shows_the_error_first() -> None:
    task = metrics_of("diffusion")
    assert task.names == ("eps_mse", "dense_mse", "accuracy", "fd", "kd")
    assert (task.headline.in_sentences, task.headline.on_axes, task.better) == ("ε-MSE", "ε-MSE", "lower")
    assert "not FID" in task["fd"].about


@EACH
def test_names_are_of_columns(task: TaskMetrics) -> None:
    assert len(set(task.names)) == len(task.columns)
    assert set(task.bars) <= set(task.names)
    assert [task[name].name for name in task.names] == list(task.names)
    assert task.headline.name in task.bars


@EACH
def test_percentages_say_so(task: TaskMetrics) -> None:
    assert all(metric.percent == ("(%)" in metric.header) for metric in task.columns)


@EACH
def test_more_decimals_than_a_table_shows(task: TaskMetrics) -> None:
    assert all(metric.digits < task.decimals for metric in task.columns)


def test_metrics_by_timestep_are_told_from_others() -> None:
    named = {"eps_mse/t0050": 1.0, "dense_mse/t0000": 2.0, "eps_mse/t0999": 3.0}
    others = {"eps_mse": 4.0, "eps_mse/seed0": 5.0, "eps_mse/t50": 6.0, "eps_mse/t00500": 7.0}
    assert list(by_timestep({**others, **named})) == [
        ("eps_mse", 50, 1.0),
        ("dense_mse", 0, 2.0),
        ("eps_mse", 999, 3.0),
    ]
