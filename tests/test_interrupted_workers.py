"""Schedulers signal every process of a job, loader workers too; the step is finished and saved all the same."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from small_project import LONG, ends, gone, ready_project, said, saved_steps, stopped, tell, tiny_params, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    params = tiny_params()
    params["learned"]["tiny-distilled"]["steps"] = LONG
    params["runtime"] |= {"loader_workers": 2, "checkpoint_steps": LONG // 2}  # one state is due on the way
    project = ready_project(tmp_path / "project", params)
    command = (sys.executable, "-m", "stages.train", "tiny-distilled")
    with stopped(project, "tiny-distilled", 1, *command) as (running, everything):
        main, *workers = everything
        assert len(workers) >= 2
        for process in (*workers, main):
            tell(process, number)
    assert ends(running) != 0
    until(lambda: gone(everything))
    assert "DataLoader worker" not in said(project)
    (step,) = saved_steps(project, "tiny-distilled")
    assert LONG // 2 < step < LONG  # not the state that was due anyway, but that of the step that the signal came in
