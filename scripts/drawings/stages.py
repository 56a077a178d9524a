"""``dvc dag`` as a picture: the stages of the active table, a line a row, from left to right what depends on what."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

from maskllm4v.config import PARAMS, Experiment, OneShotRow, load_experiment
from maskllm4v.reporting.names import short_names
from scripts.drawings.card import BLUE, GREY, INK, MINT, MUTED, ORANGE, PALE, PANEL, Card

WIDTH = 1084
COLUMNS = {  # by kind of stage: left edge and width
    "prepare": (24, 62),
    "dense": (108, 58),
    "prior": (194, 144),
    "first": (382, 174),
    "second": (600, 118),
    "evaluate": (758, 70),
    "export": (854, 56),
    "report": (938, 56),
    "documents": (938, 56),
    "track": (1016, 50),
}
FILLS = {"prior": GREY, "train": BLUE, "update": MINT, "finetune": PALE}
LANE, NODE, TOP = 31, 22, 112  # pixels from row to row, high is a node, to the first row
LATER = ("train", "update", "finetune")  # in the first column if they start from a prior, else in the second
BRANCHES = (BLUE, ORANGE, MUTED, INK)  # of stages that several rows start from
MERGED = {"report": 0, "documents": 2, "track": 0}  # stages that all rows end in, and how many lines below the middle


@dataclass(frozen=True)
class Node:
    """A stage where it is drawn."""

    name: str
    label: str
    x: float
    y: float
    width: float

    @property
    def kind(self) -> str:
        return self.name.partition("@")[0]


def dag(root: Path = Path()) -> nx.DiGraph:
    """The stages of the active table; an edge leads from a stage to one that needs it."""
    command = [sys.executable, "-m", "dvc", "dag", "--dot"]
    text = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    graph = nx.DiGraph()
    graph.add_nodes_from(re.findall(r'^"([^"]+)";', text, re.MULTILINE))
    graph.add_edges_from(re.findall(r'^"([^"]+)" -> "([^"]+)";', text, re.MULTILINE))
    return graph


def draw() -> Card:
    """Edges that follow from others (a mask needs the data, too) are left out."""
    experiment = load_experiment(PARAMS)
    graph = nx.transitive_reduction(dag())
    nodes = layout(experiment, sorted(graph))
    lanes = len(experiment.rows)
    card = Card(WIDTH, TOP + LANE * lanes + 12)
    card.text(24, 32, f"The pipeline of the table {experiment.table}", 16, weight="bold")
    card.text(
        24,
        57,
        "dvc dag, a line a row: changing one row's setting runs its own stages again, then report, "
        "documents (README) and track.",
        12,
        color=MUTED,
    )
    for number in range(0, lanes, 2):
        card.bar(12, TOP + LANE * (number - 0.5), WIDTH - 24, LANE, PANEL, layer=-1)
    kinds: dict[tuple[float, float], set[str]] = {}
    for node in nodes.values():
        if node.kind != "documents":  # it stands below report
            kinds.setdefault((node.x, node.width), set()).add(node.kind)
    for (x, width), names in kinds.items():
        card.text(x + width / 2, 88, ", ".join(sorted(names)), 12, ha="center", weight="bold")
    lines: dict[float, dict[str, int]] = {}  # number of a line down, by the column that it leads to and where it starts
    for start, end in sorted(graph.edges):
        if nodes[end].kind in LATER:
            into = lines.setdefault(nodes[end].x, {})
            into.setdefault(start, len(into))
    for start, end in sorted(graph.edges):
        _edge(card, nodes[start], nodes[end], lines.get(nodes[end].x, {}).get(start, 0))
    for node in nodes.values():
        fill = FILLS.get(node.kind, "white")
        card.box(node.x, node.y - NODE / 2, node.width, NODE, fill=fill, edge=fill if fill == BLUE else MUTED, radius=4)
        colour = "white" if fill == BLUE else INK
        card.text(node.x + node.width / 2, node.y, node.label, 11.5, ha="center", color=colour)
    return card


def layout(experiment: Experiment, stages: list[str]) -> dict[str, Node]:
    """Each stage in its row's line and its kind's column; those of all rows halfway down."""
    names, lines = short_names(experiment.rows), list(experiment.rows)
    nodes = {}
    for stage in stages:
        kind, _, row = stage.partition("@")
        if kind in LATER:
            source = experiment.row(row).source
            kind = "first" if source is None or isinstance(source, OneShotRow) else "second"
        x, width = COLUMNS[kind]
        line = lines.index(row) if row in lines else (len(lines) - 1) / 2 + MERGED[kind] if kind in MERGED else 0
        label = {"evaluate": "metrics", "export": "files", "prepare": row, "documents": "README"}.get(
            kind, names.get(row, kind)
        )
        nodes[stage] = Node(stage, label, x, TOP + LANE * line, width)
    return nodes


def _edge(card: Card, start: Node, end: Node, number: int) -> None:
    """Straight where the row stays; else down a line in front of the next column, one for each stage it comes from."""
    right, left = start.x + start.width, end.x
    colour = BRANCHES[number % len(BRANCHES)] if end.kind in LATER else MUTED
    turn = left - 14 - 8 * number
    xs, ys = (right, turn, turn, left), (start.y, start.y, end.y, end.y)
    card.axes.plot(xs, ys, color=colour, linewidth=0.9, zorder=0.5, solid_joinstyle="round")
