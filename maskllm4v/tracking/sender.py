"""Sends a row's curves to a run while they grow: ``python -m maskllm4v.tracking.sender ROW``, started by a training.

Standard input says what the row is (an experiment, as JSON on one line), then ``done`` if the training came to its end;
the stream ends with the training, whatever ended that. The publication of the row's record goes on in the same run.
"""

from __future__ import annotations

import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from maskllm4v.config import Experiment
from maskllm4v.reporting.names import short_names
from maskllm4v.runs.curves import FollowedCurve
from maskllm4v.runs.paths import live_file
from maskllm4v.tracking import writers
from maskllm4v.tracking.points import Point, as_metrics, mean_points, seed_points
from maskllm4v.tracking.runs import LIVE, identity, parameters, settings_tags
from maskllm4v.tracking.store import connect, experiment_id, runs_of
from maskllm4v.utils.redaction import redacted

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

INTERVAL = 1.0  # seconds between two looks at the curves
SIGN = 600.0  # seconds between two signs of life
WAITS = (5.0, 60.0)  # seconds to wait after a failure, at first and at most
BATCH = 1000


class Sender:
    """Follows the curves of a row.

    Args:
        root: the repository's root, or that of a copy; where the training runs.
        experiment: of the row.
        row: its key.
    """

    def __init__(self, root: Path, experiment: Experiment, row: str) -> None:
        self.root, self.experiment, self.row = root, experiment, row
        paths = sorted(live_file(row, seed) for seed in experiment.row(row).seeds)
        self.curves = {path.stem: FollowedCurve(path) for path in paths}
        self.averaged = 0  # points that all seeds had the last time
        self.pending: list[Point] = []
        self.client: MlflowClient | None = None
        self.run_id = ""
        self.signed = 0.0

    def take(self) -> None:
        """Take what has come since the last time."""
        for seed, curve in self.curves.items():
            count = len(curve.points)
            with suppress(FileNotFoundError):  # its training has not begun
                curve.update()
            self.pending += seed_points(seed, curve.points[count:])
        of_all = min(len(curve.points) for curve in self.curves.values())
        self.pending += mean_points([curve.points[self.averaged : of_all] for curve in self.curves.values()])
        self.averaged = of_all

    def send(self) -> None:
        """Send what is pending; what fails stays pending."""
        if self.client is None:
            self.client = connect(self.root)
        if not self.run_id:
            self.run_id = self._run(self.client)
        while self.pending:
            self.client.log_batch(self.run_id, metrics=as_metrics(self.pending[:BATCH]))
            self.pending = self.pending[BATCH:]
        if time.monotonic() - self.signed > SIGN:
            self.client.set_tag(self.run_id, writers.TAG, writers.signed(self.root))
            self.signed = time.monotonic()

    def end(self, done: bool) -> None:
        """Send the rest, and say how the training ended."""
        self.take()
        self.send()
        assert self.client is not None
        self.client.set_tag(self.run_id, LIVE, "trained" if done else "interrupted")
        self.client.set_terminated(self.run_id, "FINISHED" if done else "KILLED")

    def _run(self, client: MlflowClient) -> str:
        """The run of this repository's training that was interrupted, or a new one."""
        from mlflow.entities import Param

        tags = {
            **identity(self.experiment, self.row),
            **settings_tags(self.experiment, self.row),
            LIVE: "training",
            writers.TAG: writers.signed(self.root),
        }
        place, name = experiment_id(client, self.root, self.experiment), short_names(self.experiment.rows)[self.row]
        for run in runs_of(client, place, self.row):
            found = run.data.tags
            mine = LIVE in found and writers.is_from(found, self.root) and writers.is_dead(found)
            if mine and found.get("settings_digest") == tags["settings_digest"]:
                run_id = str(run.info.run_id)
                for key in (writers.TAG, LIVE):
                    client.set_tag(run_id, key, tags[key])
                client.update_run(run_id, status="RUNNING")
                break
        else:
            run_id = str(client.create_run(place, run_name=name, tags=tags).info.run_id)
        params = [Param(key, value) for key, value in parameters(self.experiment, self.row).items()]
        for first in range(0, len(params), 100):
            client.log_batch(run_id, params=params[first : first + 100])
        return run_id


def main() -> None:
    os.nice(10)  # the training goes first
    # MLflow would try for minutes; here a later look tries again.
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    stream = _Stream(sys.stdin.fileno())
    while not stream.lines and not stream.ended:
        stream.wait(None)
    if not stream.lines:
        return
    sender = Sender(Path(), Experiment.model_validate_json(stream.lines[0]), sys.argv[1])
    warned, pause, again = False, WAITS[0], 0.0
    while not stream.ended:
        sender.take()
        if time.monotonic() >= again:
            try:
                sender.send()
                pause = WAITS[0]
            except Exception as error:  # MLflow's, its database's, its network's: the training does not care
                warned = warned or _warn(error)
                again, pause = time.monotonic() + pause, min(2 * pause, WAITS[1])
        stream.wait(INTERVAL)
    try:
        sender.end(done=b"done" in stream.lines)
    except Exception as error:
        warned = warned or _warn(error)


def _warn(error: Exception) -> bool:
    said = redacted(" ".join(str(error).split()))[:160]
    print(f"MLflow cannot be reached, so this training cannot be watched there: {said}", file=sys.stderr, flush=True)
    return True


class _Stream:
    """Lines of a stream that nobody waits for longer than they want to."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.rest = descriptor, b""
        self.lines: list[bytes] = []
        self.ended = False

    def wait(self, seconds: float | None) -> None:
        """Wait for something to read, or for the end of the stream."""
        if not select.select([self.descriptor], [], [], seconds)[0]:
            return
        read = os.read(self.descriptor, 2**16)
        self.ended = not read
        *lines, self.rest = (self.rest + read).split(b"\n")
        self.lines += lines


if __name__ == "__main__":
    main()
