"""``make chaos`` knows every stage, and what it counts."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import yaml
from import_graph import ROOT

from maskllm4v.config import parse_experiment
from scripts.chaos.__main__ import _table
from scripts.chaos.chain import STAGES, TABLE, settings
from scripts.chaos.trials import FAULT, NAMED, OTHERS, READ, SAME, SKIPPED, _damaged, trials


def test_every_stage_of_the_pipeline_is_killed() -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert sorted(STAGES) == sorted(pipeline)
    assert {f"kill {stage}" for stage in pipeline} <= set(trials())


def test_the_shortened_chain_has_the_rows_that_are_broken() -> None:
    experiment = parse_experiment(settings(), "chaos")
    assert experiment.table == TABLE
    rows = {row for stage, (row, _) in STAGES.items() if stage != "prepare" and row}
    assert rows <= set(experiment.rows)
    assert set(OTHERS) <= set(READ)
    assert {stage for stage, _ in READ.values()} <= set(STAGES)


@pytest.mark.parametrize("how", ["bit", "half", "empty", "noise"])
def test_damage_changes_a_file(how: str) -> None:
    content = bytes(range(256))
    for seed in range(20):
        assert _damaged(content, how, random.Random(seed)) != content


def test_counts_of_kinds_add_up() -> None:
    counts = {"kill x": Counter({SAME: 2, FAULT: 1}), "full disk": Counter({NAMED: 1, SKIPPED: 3})}
    assert _table(counts).splitlines()[2:] == [
        "| kill x | 3 | 2 | 0 | 1 |",
        "| full disk | 1 | 0 | 1 | 0 |",
        "| all | 4 | 2 | 1 | 1 |",
    ]
