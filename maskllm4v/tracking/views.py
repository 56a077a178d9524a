"""A saved view of MLflow's run list: the table's rows, ranked, and the charts that compare them.

Left to itself the UI opens with a chart a metric, in the alphabet's order, and no column but the dates. A view is a tag
of the experiment, as the UI's own "Save as new view" writes it (MLflow 3.17); a UI that knows no such tag shows none.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from maskllm4v.config.metrics import TaskMetrics
from maskllm4v.tracking.store import insisting

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

NAME = "table"  # in the UI's menu "Views", and in links: ?viewStateShareKey=table
TAG = f"mlflow.sharedViewState.{NAME}"
SHOWN = 20  # runs in charts; the UI has no greater number but all
CURVES = ("loss", "max_probability", "off_prior", "flipped", "tau", "scaling")
RESULTS, TRAINING, PICTURES = "results", "training", "pictures"


def publish_view(client: MlflowClient, experiment_id: str, metrics: TaskMetrics, pictures: Sequence[str] = ()) -> None:
    """Tag an experiment with its view, and as one of trainings, which the UI opens with their runs."""
    tags = {"mlflow.experimentKind": "custom_model_development", TAG: saved_view(metrics, pictures)}
    there = client.get_experiment(experiment_id).tags
    for key, value in tags.items():
        if there.get(key) != value:
            insisting(partial(client.set_experiment_tag, experiment_id, key, value))


def saved_view(metrics: TaskMetrics, pictures: Sequence[str] = ()) -> str:
    """The tag's value: runs of the table as it stands, the best headline first; results, pictures, curves.

    Args:
        metrics: of the table's task.
        pictures: keys of the images that its runs hold.
    """
    headline = metrics.headline.name
    bars = [headline, f"{headline}/delta", *metrics.names[1:]]
    columns = [f"metrics.`{name}`" for name in bars]
    columns += [f"tags.`{name}`" for name in ("method", "prior", "pattern")] + ["params.`learning.steps`"]
    state = {
        "searchFilter": 'tags.current = "true"',
        "orderByKey": f"metrics.`{headline}`",
        "orderByAsc": metrics.better == "lower",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": f"FIRST_{SHOWN}_RUNS",
        "compareRunCharts": [*map(_bar, bars), *_by_timestep(headline), *_images(pictures), *map(_curve, CURVES)],
        "compareRunSections": list(map(_section, (RESULTS, *([PICTURES] if pictures else []), TRAINING))),
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": NAME, "createdAt": 1, "updatedAt": 1, "state": f"deflate;{packed}"})


def _bar(metric: str) -> dict[str, Any]:
    return {**_chart("BAR", RESULTS, metric), "displayName": metric, "metricKey": metric}


def _curve(column: str) -> dict[str, Any]:
    return _line(TRAINING, column, f"train/{column}")


def _by_timestep(headline: str) -> list[dict[str, Any]]:
    """Hidden where no run has it."""
    return [_line(RESULTS, f"{headline} by timestep", f"timesteps/{headline}")]


def _line(section: str, name: str, metric: str) -> dict[str, Any]:
    x = {"xAxisKey": "step", "xAxisScaleType": "linear", "selectedXAxisMetricKey": "", "useGlobalXaxisKey": True}
    y = {"yAxisKey": "metric", "yAxisExpressions": [], "scaleType": "linear", "range": {}, "ignoreOutliers": False}
    smoothing = {"lineSmoothness": 0, "useGlobalLineSmoothing": True}
    return {**_chart("LINE", section, name), "displayName": name, "metricKey": metric, **x, **y, **smoothing}


def _images(keys: Sequence[str]) -> list[dict[str, Any]]:
    return [{**_chart("IMAGE", PICTURES, key), "imageKeys": [key], "step": 0, "showRunParams": False} for key in keys]


def _chart(kind: str, section: str, name: str) -> dict[str, Any]:
    return {
        "uuid": f"{section}-{name}",
        "type": kind,
        "runsCountToCompare": SHOWN,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }


def _section(name: str) -> dict[str, Any]:
    fixed = {"display": True, "isReordered": False, "deleted": False, "isGenerated": False}
    return {"uuid": name, "name": name.capitalize(), **fixed}
