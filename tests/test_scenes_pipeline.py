"""Segmentation and detection on scenes: the stages end to end, and the same numbers on several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from import_graph import ROOT
from parsed_page import Page
from small_pipeline import stage, write_params
from small_project import said, together
from small_scenes import Kind, experiment, open_small, raw

from maskllm4v.config import load_experiment
from maskllm4v.data import prepare
from maskllm4v.training.dense import train_dense
from maskllm4v.utils.images import read_picture
from maskllm4v.utils.io import read_json
from maskllm4v.utils.processes import rank

pytest.importorskip("pycocotools")
KINDS: tuple[Kind, ...] = ("segmentation", "detection")
EACH = pytest.mark.parametrize("kind", KINDS)
ROWS = ("dense", "magnitude", "sparsegpt", "squares", "masks", "hybrid")
STEPS = [
    *([("prepare", "scenes"), ("dense", "small-dense")]),
    *(("prior", f"small-{row}") for row in ("magnitude", "sparsegpt")),
    *([("update", "small-squares"), ("train", "small-masks"), ("train", "small-hybrid")]),
    *(("evaluate", f"small-{row}") for row in ROWS),
    *([("export", "small-masks"), ("report",), ("documents",)]),
]
METRICS = {
    "segmentation": {"miou", "pixel_accuracy", "miou_border", "miou_inner", "miou_rare", "iou/ground", "iou/7"},
    "detection": {"map", "map50", "map75", "map_small", "map_medium", "map_large", "map_rare", "ap/7"},
}


def params(kind: Kind) -> dict[str, Any]:
    training = {"steps": 3, "batch_size": 4, "lr": 0.05, "log_every": 1}
    return raw(
        kind,
        priors={
            "small-magnitude": {"method": "magnitude"},
            "small-sparsegpt": {"method": "sparsegpt", "update_weights": True, "pattern": "1:4"},
        },
        updated={"small-squares": {"masks": "small-magnitude", "update": "least_squares"}},
        learning=training,
        learned={
            "small-masks": {"prior": "small-magnitude"},
            "small-hybrid": {"prior": "small-squares", "weights": "updated", "distillation": 0.5},
        },
        rows={f"small-{row}": row for row in ROWS},
        exports={"small-masks": {"formats": ["packed"], "dtypes": ["fp32"]}},
    )


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    """All stages."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    (folder / "experiments").mkdir()
    for name in ("benchmarks", "receipts"):
        (folder / "reports" / name).mkdir(parents=True)
    (folder / "README.md").write_text("<!-- small -->\n<!-- /small -->\n")
    write_params(folder, params(kind))
    for name, *arguments in STEPS:
        done = stage(folder, name, *arguments, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    return kind, folder


@pytest.mark.slow
def test_records_hold_the_whole_its_parts_and_its_classes(made: tuple[Kind, Path]) -> None:
    kind, folder = made
    settings = load_experiment(folder / "params.yaml")
    for row in ROWS:
        record = read_json(folder / f"reports/small/runs/small-{row}/evaluation/record.json")
        metrics = record["metrics"]["0"]
        assert METRICS[kind] | ({"agreement"} if row != "dense" else set()) <= metrics.keys()
        assert all(0 <= value <= 100 for value in metrics.values())
        assert record["settings"] == settings.row(f"small-{row}").record_settings()
        assert ("pycocotools" in record["versions"]) == (kind == "detection")


@pytest.mark.slow
def test_rows_are_pictured_on_the_same_images(made: tuple[Kind, Path]) -> None:
    """Three images, the truth, and what is found; the first two lines are the same in all rows."""
    folder = made[1]
    pictures = [read_picture(folder / f"reports/small/runs/small-{row}/evaluation/predictions.png") for row in ROWS]
    side, gap = 3 * 32, 2
    assert {picture.shape for picture in pictures} == {(3 * (side + gap) - gap, 3 * (side + gap) - gap, 3)}
    above = 2 * (side + gap)
    assert all((picture[:above] == pictures[0][:above]).all() for picture in pictures)
    image, truth = pictures[0][:side], pictures[0][side + gap : above - gap]
    assert (image[..., 0] == image[..., 1]).all()  # grey
    assert (truth[..., 0] != truth[..., 1]).any()  # colours over it
    page = Page((folder / "reports/small/index.html").read_text())
    assert len(page.find("img")) == len(ROWS)
    assert (folder / "reports/small/figures/predictions.png").exists()


@pytest.mark.slow
def test_what_breaks_first_stands_on_the_page_and_in_the_readme(made: tuple[Kind, Path]) -> None:
    kind, folder = made
    page = Page((folder / "reports/small/index.html").read_text())
    (section,) = page.find("section", id="losses")
    shown = {e.shows[:2]: e.text for e in page.inside(section) if e.tag == "td" and e.shows[0]}
    part = {"segmentation": "miou_border", "detection": "map_large"}[kind]
    values = {
        row: read_json(folder / f"reports/small/runs/small-{row}/evaluation/record.json")["metrics"]["0"][part]
        for row in ROWS
    }
    assert shown["small-dense", part] == f"{values['dense']:.1f}"
    for row in ROWS[1:]:
        assert shown[f"small-{row}", f"{part}/delta"] == f"{values[row] - values['dense']:+.1f}"
    readme = (folder / "README.md").read_text()
    assert "What pruning breaks first" in readme
    assert (folder / "reports/small/table.md").read_text() in readme


def evaluate(kind: Kind) -> None:
    """A model that was trained a little, against one that was not."""
    task = open_small(kind, Path("data"))
    model = task.build_model(0)
    model.load_state_dict(torch.load("model.pt"))
    Path(f"found-{rank()}.json").write_text(json.dumps(task.evaluate(model, task.build_model(0))))


@pytest.mark.slow
@EACH
def test_two_processes_measure_what_one_does(kind: Kind, tmp_path: Path) -> None:
    """To the last bit, ties included: 13 images do not share out evenly."""
    settings = experiment(kind, dense={**raw(kind)["dense"], "steps": 60})
    prepare(settings.data, tmp_path / "data")
    task = open_small(kind, tmp_path / "data")
    model = task.build_model(0)
    train_dense(model, task, settings.dense, seed=0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = []
    for processes in (1, 2):
        assert together(tmp_path, evaluate, kind, processes=processes) == [0] * processes, said(tmp_path)
        found += [json.loads((tmp_path / f"found-{number}.json").read_text()) for number in range(processes)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) > 5
