"""The saved view of a table: what MLflow's UI will read."""

from __future__ import annotations

import base64
import json
import zlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow.exceptions import MlflowException

from maskllm4v.config.tasks import task_names
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.tracking.views import TAG, publish_view, saved_view
from maskllm4v.training.mask_learning import CURVE_COLUMNS


def state(value: str) -> dict[str, Any]:
    """As the UI unpacks it."""
    kind, _, packed = json.loads(value)["state"].partition(";")
    assert kind == "deflate"
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return found


@pytest.mark.parametrize("task", task_names())
def test_view_ranks_by_the_headline_and_shows_every_metric(task: str) -> None:
    metrics = metrics_of(task)
    found = state(saved_view(metrics))
    assert found["orderByKey"] == f"metrics.`{metrics.headline.name}`"
    assert found["orderByAsc"] == (metrics.better == "lower")  # the best one first
    bars = [chart["metricKey"] for chart in found["compareRunCharts"] if chart["type"] == "BAR"]
    assert set(bars) == {*metrics.names, f"{metrics.headline.name}/delta"}
    assert {f"metrics.`{name}`" for name in bars} <= set(found["selectedColumns"])


def test_charts_stand_in_sections_that_exist_and_have_names_of_their_own() -> None:
    found = state(saved_view(metrics_of("diffusion"), ["samples"]))
    charts, sections = found["compareRunCharts"], [section["uuid"] for section in found["compareRunSections"]]
    assert {chart["metricSectionId"] for chart in charts} == set(sections)
    assert len({chart["uuid"] for chart in charts}) == len(charts)
    assert [chart["imageKeys"] for chart in charts if chart["type"] == "IMAGE"] == [["samples"]]
    assert "pictures" not in [
        section["uuid"] for section in state(saved_view(metrics_of("diffusion")))["compareRunSections"]
    ]


def test_curves_are_columns_that_trainings_write() -> None:
    charts = state(saved_view(metrics_of("classification")))["compareRunCharts"]
    curves = {chart["metricKey"] for chart in charts if chart["metricKey"].startswith("train/")}
    assert curves
    assert curves <= {f"train/{column}" for column in CURVE_COLUMNS}


def test_same_table_same_bytes() -> None:
    assert saved_view(metrics_of("diffusion")) == saved_view(metrics_of("diffusion"))


class Contested:
    """A store in which another writer sets each tag a moment before, and then no more (or always)."""

    def __init__(self, *, always: bool = False) -> None:
        self.tags: dict[str, str] = {}
        self._always = always

    def get_experiment(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, _: str, key: str, value: str) -> None:
        if key in self.tags and not self._always:
            self.tags[key] = value
            return
        self.tags[key] = "theirs"
        raise MlflowException("UNIQUE constraint failed: experiment_tags.key, experiment_tags.experiment_id")


def test_another_writer_may_have_set_the_same_view() -> None:
    store: Any = Contested()
    publish_view(store, "1", metrics_of("classification"))
    assert store.tags[TAG] == saved_view(metrics_of("classification"))
    with pytest.raises(MlflowException):
        publish_view(cast(Any, Contested(always=True)), "1", metrics_of("classification"))
