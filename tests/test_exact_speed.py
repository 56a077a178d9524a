"""The benchmarks of exact runs: that they run, what they compare, and how their numbers are shown."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from import_graph import ROOT

from benchmarks import commits, step_commits
from maskllm4v.config import load_experiment
from maskllm4v.reporting.benchmarks.performance import performance_markdown
from maskllm4v.utils.io import read_json, write_json


def test_exact_step_runs(tmp_path: Path) -> None:
    """In a process of its own, which is pinned before it imports torch."""
    out = tmp_path / "x.json"
    subprocess.run([sys.executable, "-m", "benchmarks.exact_step", "--quick", "--out", str(out)], check=True, cwd=ROOT)
    rows = read_json(out)["sections"]["steps"]
    kinds = [(row["kind"], row["candidate"]) for row in rows]
    both = ["before", "products", "masks", "now"]
    assert kinds == [("dense", name) for name in both[:2]] + [
        (kind, name) for kind in ("ours", "ours_distilled") for name in both
    ]
    assert all(
        row["n"] == 2 and row["ms"] > 0 and (row["ratio"] == 1) == (row["candidate"] == "before") for row in rows
    )


def test_stages_run_after_what_they_need_and_each_once() -> None:
    experiment = load_experiment(ROOT / "experiments" / "digits.yaml")
    found = [(stage, row) for _, stage, row in commits.items(experiment)]
    assert len(found) == len(set(found))
    made = {**experiment.priors, **experiment.updated, **experiment.learned}
    assert {row for stage, row in found if stage in ("prior", "update", "train")} == set(made)
    assert [row for stage, row in found if stage == "evaluate"] == list(experiment.rows)
    place = {row: i for i, (stage, row) in enumerate(found) if stage in ("prior", "update", "train")}
    for row in (*experiment.updated, *experiment.learned):
        assert place[commits._source(experiment, row)] < place[row]


def test_both_commits_run_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(ROOT / "experiments" / "digits.yaml")
    seen: list[tuple[str, str]] = []

    def seconds(command: list[str], folder: Path) -> float:
        seen.append((folder.name, " ".join(command[2:])))
        return 4.0 if folder.name == "old" else 1.0

    monkeypatch.setattr(commits, "cpu_seconds", seconds)
    rows = commits.measure(experiment, {"before": tmp_path / "old", "after": tmp_path / "new"}, 2)
    assert [name for name, _ in seen] == ["old", "new"] * (len(seen) // 2)
    masked = next(row for row in rows if row["kind"] == "evaluate, masked")
    assert masked == {"kind": "evaluate, masked", "items": 24, "n": 2, "before_s": 4, "after_s": 1, "ratio": 0.25}
    count = len(list(commits.items(experiment)))
    assert rows[-1] == {"kind": "total", "items": count, "before_s": 4 * count, "after_s": count, "ratio": 0.25}
    # What the measured rows are made from is there before they run, even where it is not measured itself.
    places = {row: i for i, (_, row) in enumerate(seen)}
    for name in ("digits-hybrid-short", "digits-maskllm-permuted", "digits-magnitude-ls"):
        stage = "update" if name in experiment.updated else "train"
        if f"stages.{stage} {name}" in places:
            source = commits._source(experiment, name)
            kind = "update" if source in experiment.updated else "prior"
            assert places[f"stages.{kind} {source}"] < places[f"stages.{stage} {name}"]


def test_steps_of_both_commits_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    class Steps:
        def __init__(self, folder: Path) -> None:
            self.folder = folder.name

        def seconds(self, variant: str, count: int) -> float:
            seen.append((self.folder, variant))
            return {"dense": 1.0, "ours": 1.5, "ours_distilled": 2.0}[variant] * (2.0 if self.folder == "old" else 1.0)

    monkeypatch.setattr(step_commits, "steps_in", lambda folder, model: nullcontext(Steps(folder)))
    rows = step_commits.measure("digits", {"before": tmp_path / "old", "after": tmp_path / "new"}, 3)
    assert rows[1] == {
        "model": "digits",
        "variant": "ours",
        "n": 3,
        "before_ms": 3000.0,
        "after_ms": 1500.0,
        "ratio": 0.5,
        "to_dense": 1.5,
    }
    turns = [set(seen[start : start + 6]) for start in range(0, len(seen), 6)]
    assert len(turns) == 4
    assert all(len(turn) == 6 for turn in turns)


@pytest.mark.slow
def test_a_clone_takes_steps_when_asked() -> None:
    with step_commits.steps_in(ROOT, "digits", ["ours"]) as steps:
        assert steps.seconds("ours", 1) > 0


def test_how_they_are_shown(tmp_path: Path) -> None:
    machine = {"hardware": "a machine", "threads": 1, "versions": {"torch": "9.9"}, "notes": []}
    steps = [
        {"kind": "ours", "candidate": name, "n": 3, "ms": ms, "ratio": ms / 30}
        for name, ms in (("before", 30.0), ("products", 24.0), ("masks", 22.5), ("now", 15.0))
    ]
    steps.append({"kind": "dense", "candidate": "before", "n": 3, "ms": 20.0, "ratio": 1.0})
    write_json(tmp_path / "benchmarks" / "exact_step.json", {**machine, "sections": {"steps": steps}})
    stages = [
        {"kind": "update", "items": 6, "n": 3, "before_s": 8.0, "after_s": 6.0, "ratio": 0.75},
        {"kind": "total", "items": 54, "before_s": 812.0, "after_s": 570.0, "ratio": 0.702},
    ]
    write_json(tmp_path / "benchmarks" / "commits.json", {**machine, "sections": {"stages": stages}})
    text = performance_markdown(tmp_path)
    assert "| mask learning | 30.0 ms (1.00×) | 24.0 ms (0.80×) | 22.5 ms (0.75×) | 15.0 ms (0.50×) |" in text
    assert "| dense | 20.0 ms (1.00×) | – | – | – |" in text
    assert "| update | 6 | 8.00 s | 6.00 s | 0.75× |" in text
    assert "| total | 54 | 812 s | 570 s | 0.70× |" in text
