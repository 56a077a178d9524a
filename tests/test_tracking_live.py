"""Trainings watched in MLflow while they run: in the run that their record ends in, and never in their way."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT
from mlflow_server import content, runs, server, their_warnings
from small_project import (
    STEPS,
    copied,
    ends,
    family,
    gone,
    ready_project,
    results,
    run_stage,
    said,
    started,
    tiny_params,
    until,
    write_params,
)

from maskllm4v.config import load_experiment
from maskllm4v.runs.curves import FollowedCurve, GrowingCurve, read_curve, write_curve
from maskllm4v.tracking.publishing import publish

ROW = "tiny-averaged"
POINTS = [*range(0, STEPS, 4), STEPS - 1]  # steps of the curve
GATE = 13  # where trainings wait: the next point is 16
HELD = [step for step in POINTS if step < GATE]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with their_warnings():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, dense models and priors of two seeds, trained side by side, and an empty store."""
    params = tiny_params()
    params |= {
        "seeds": [0, 1],
        "rows": {row: row for row in params["rows"] if row in ("tiny-dense", "tiny-magnitude", ROW)},
    }
    params["learned"] = {ROW: params["learned"][ROW]}
    params |= {"finetuned": {}, "updated": {}, "priors": {"tiny-magnitude": params["priors"]["tiny-magnitude"]}}
    params["runtime"] |= {"seed_processes": 2}
    folder = ready_project(tmp_path_factory.mktemp("inputs"), params)
    assert run_stage(folder, "evaluate", "tiny-dense") == [0], said(folder)
    from mlflow.tracking import MlflowClient

    with their_warnings():
        MlflowClient(store(folder)).search_experiments()
    return folder


@pytest.fixture
def project(inputs: Path, tmp_path: Path) -> Path:
    return copied(inputs, tmp_path / "project")


@pytest.fixture(scope="module")
def unwatched(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same project, trained and measured without a store."""
    folder = copied(inputs, tmp_path_factory.mktemp("unwatched") / "project")
    (folder / "mlflow.db").unlink()
    assert run_stage(folder, "train", ROW) == [0], said(folder)
    assert said(folder) == ""
    assert not (folder / ".cache/live").joinpath(ROW).exists()
    assert run_stage(folder, "evaluate", ROW) == [0], said(folder)
    return folder


def store(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def gated(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The training, which waits at the gate until there is a file ``go``."""
    command = (sys.executable, str(ROOT / "tests/gated_stage.py"), "train", ROW, str(GATE))
    return started(folder, *command, **environment)


def steps_of(uri: str, metric: str = "train/loss") -> list[int]:
    from mlflow.tracking import MlflowClient

    found = runs(uri, "tiny")
    return (
        [point.step for point in MlflowClient(uri).get_metric_history(found[-1].info.run_id, metric)] if found else []
    )


def published(folder: Path) -> dict[str, Any]:
    publish(folder, load_experiment(folder / "params.yaml"))
    return {run.data.tags["row"]: run for run in runs(store(folder), "tiny")}


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_one_run(project: Path, unwatched: Path) -> None:
    """Curves of both seeds come while they train; the finished run is the same as one that nobody watched."""
    running = gated(project)
    until(lambda: steps_of(store(project)) == HELD)
    assert running.poll() is None, said(project)
    (run,) = runs(store(project), "tiny")
    assert (run.info.status, run.data.tags["live"], run.data.tags["stage"]) == ("RUNNING", "training", "train")
    assert run.data.params["learning.steps"] == str(STEPS)
    assert steps_of(store(project), "train/tau/seed1") == HELD
    everyone = family(running)
    assert len(everyone) == 4  # two seeds, and who sends
    os.kill(running.pid, signal.SIGKILL)
    until(lambda: gone(everyone))
    (run,) = runs(store(project), "tiny")
    assert (run.info.status, run.data.tags["live"]) == ("KILLED", "interrupted")

    running = gated(project)
    until(lambda: runs(store(project), "tiny")[0].data.tags["live"] == "training")
    (project / "go").touch()
    assert ends(running) == 0, said(project)
    (again,) = runs(store(project), "tiny")
    assert (again.info.run_id, again.info.status, again.data.tags["live"]) == (run.info.run_id, "FINISHED", "trained")
    assert steps_of(store(project)) == POINTS
    assert said(project) == ""
    assert results(project, ROW) == results(unwatched, ROW)

    assert run_stage(project, "evaluate", ROW) == [0], said(project)
    found, other = published(project), published(unwatched)
    assert found.keys() == other.keys() == {"tiny-dense", ROW}
    assert found[ROW].info.run_id == run.info.run_id
    assert content(store(project), run.info.run_id) == content(store(unwatched), other[ROW].info.run_id)


@pytest.mark.slow
def test_other_results_than_those_watched_get_a_run_of_their_own(project: Path, unwatched: Path) -> None:
    (project / "go").touch()
    running = gated(project)
    assert ends(running) == 0
    (run,) = runs(store(project), "tiny")
    shutil.copytree(unwatched / "reports", project / "reports", dirs_exist_ok=True)
    curve = project / f"reports/tiny/runs/{ROW}/curves/seed1.csv"
    columns, points = list(read_curve(curve)[0]), [list(point.values()) for point in read_curve(curve)]
    points[2][1] += 1
    write_curve(curve, columns, points)
    found = published(project)[ROW]
    assert found.info.run_id != run.info.run_id
    assert found.data.tags["record_digest"]
    assert "live" not in found.data.tags


@pytest.mark.slow
def test_ctrl_c_leaves_nobody_behind(project: Path) -> None:
    running = gated(project)
    until(lambda: steps_of(store(project)) == HELD)
    everyone = family(running)
    (project / "go").touch()
    os.killpg(running.pid, signal.SIGINT)
    ends(running)
    until(lambda: gone(everyone))
    (run,) = runs(store(project), "tiny")
    assert (run.info.status, run.data.tags["live"]) in {("KILLED", "interrupted"), ("FINISHED", "trained")}
    assert "MLflow" not in said(project)


@pytest.mark.slow
def test_a_server_that_dies_costs_one_line(project: Path, unwatched: Path, tmp_path: Path) -> None:
    with server(tmp_path) as alive:
        running = gated(project, MLFLOW_TRACKING_URI=alive.uri)
        until(lambda: steps_of(alive.uri) == HELD)
        alive.stop()
        (project / "go").touch()
        assert ends(running) == 0, said(project)
    (line,) = said(project).splitlines()
    assert line.startswith("MLflow cannot be reached, so this training cannot be watched there: ")
    assert results(project, ROW) == results(unwatched, ROW)


@pytest.mark.slow
def test_no_server_costs_one_line(project: Path, unwatched: Path) -> None:
    with socket.socket() as taken:  # bound, and deaf
        taken.bind(("127.0.0.1", 0))
        running = gated(project, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{taken.getsockname()[1]}")
        until(lambda: "cannot be reached" in said(project))
        (project / "go").touch()
        assert ends(running) == 0, said(project)
    assert len(said(project).splitlines()) == 1
    assert results(project, ROW) == results(unwatched, ROW)


@pytest.mark.slow
def test_it_can_be_turned_off(project: Path) -> None:
    params = tiny_params() | {"seeds": [0]}
    params["runtime"]["live"] = False
    write_params(project, params)
    assert run_stage(project, "dense", "tiny-dense") == [0], said(project)
    assert run_stage(project, "prior", "tiny-magnitude") == [0], said(project)
    assert run_stage(project, "train", ROW) == [0], said(project)
    assert runs(store(project), "tiny") == []


def test_a_growing_curve_has_the_text_of_the_finished_one(tmp_path: Path) -> None:
    points = [(float(step), 1 / (step + 3), 1e-9 * step) for step in range(0, 40, 4)]
    write_curve(tmp_path / "finished.csv", ("step", "loss", "lr"), points)
    path = tmp_path / "live" / "seed0.csv"
    grow, follow = GrowingCurve(path, ("step", "loss", "lr")), FollowedCurve(path)
    for first, last in ((0, 3), (3, 3), (3, 4), (4, 10)):
        grow(points[first:last])
        follow.update()
        assert [point["step"] for point in follow.points] == [point[0] for point in points[:last]]
    assert path.read_bytes() == (tmp_path / "finished.csv").read_bytes()
    assert follow.points == read_curve(tmp_path / "finished.csv")
    GrowingCurve(path, ("step", "loss", "lr"))(points[:2])  # the next training's
    assert len(read_curve(path)) == 2


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("step,loss\n0,0.5\n4,0.")
    curve = FollowedCurve(path)
    curve.update()
    assert curve.points == [{"step": 0, "loss": 0.5}]
    with path.open("a") as file:
        file.write("25\n")
    curve.update()
    assert curve.points[1:] == [{"step": 4, "loss": 0.25}]


def test_a_curve_that_cannot_be_written_stops_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    grow = GrowingCurve(tmp_path / "file" / "seed0.csv", ("step", "loss"))
    grow([(0.0, 1.0)])
    grow([(4.0, 1.0)])
    assert (tmp_path / "file").read_bytes() == b""
