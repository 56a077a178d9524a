"""The README's figures are what the script draws, and show what the project does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from import_graph import ROOT

from maskllm4v.config import Experiment, load_experiment
from scripts.drawings import stages
from scripts.drawings.example import PATTERN, group

FIGURES = ROOT / "docs" / "figures"
NAMES = ("framework", "sampling", "stages")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    command = [sys.executable, "-m", "scripts.draw_figures", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_committed_figures_are_what_is_drawn(drawn: Path, name: str) -> None:
    for suffix in (".svg", ".png"):
        path = (FIGURES / name).with_suffix(suffix)
        assert (drawn / path.name).read_bytes() == path.read_bytes(), f"{path.name}: run `make figures`"


# The graph of stages


def of_file(experiment: Experiment) -> set[str]:
    """Names of all stages that ``dvc.yaml`` makes of an experiment, read without DVC."""
    raw = experiment.model_dump()
    lists = {"${data.name}": raw["data"]["name"], "${dense.row}": raw["dense"]["row"]}
    found = set()
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        items = stage.get("foreach")
        if isinstance(items, list):
            found |= {f"{name}@{lists[item]}" for item in items}
        else:
            found |= {f"{name}@{row}" for row in raw[items[2:-1]]} if items else {name}
    return found


def test_graph_has_every_stage_of_the_file() -> None:
    experiment = load_experiment(ROOT / "params.yaml")
    graph = stages.dag(ROOT)
    assert set(graph) == of_file(experiment)
    nodes = stages.layout(experiment, sorted(graph))
    assert set(nodes) == set(graph)
    places = {(node.x, node.y) for node in nodes.values()}
    assert len(places) == len(nodes)  # none hides another
    assert all(nodes[start].x + nodes[start].width < nodes[end].x for start, end in graph.edges)  # to the right


@pytest.mark.parametrize("table", ["cifar10", "dit_digits", "digits_patterns", "imagenet_vit_b16"])
def test_other_tables_can_be_laid_out(table: str) -> None:
    experiment = load_experiment(ROOT / "experiments" / f"{table}.yaml")
    nodes = stages.layout(experiment, sorted(of_file(experiment)))
    assert len({(node.x, node.y) for node in nodes.values()}) == len(nodes)


# The example


def test_draws_become_one_hot() -> None:
    example = group()
    soft, _ = example.sample(4.0, 10.0, 64)
    hard, masks = example.sample(0.05, 100.0, 64)
    assert soft.max(1).values.mean() < 0.5
    assert hard.max(1).values.mean() > 0.99
    assert set(masks.unique().tolist()) == {0.0, 1.0}


def test_soft_masks_are_the_candidates_mixed() -> None:
    p, mask = group().sample(3.0, 30.0, 16)
    assert torch.allclose(p.sum(1), torch.ones(16, dtype=torch.float64), atol=5e-4)
    assert torch.allclose(p @ PATTERN.candidates(dtype=torch.float64), mask, atol=5e-4)


def test_prior_is_among_the_likeliest_candidates() -> None:
    example = group()
    assert PATTERN.candidates()[example.logits.argmax()].equal(example.prior)
