"""Rows with updated weights in the pipeline: made, learned on, measured, shown, and made again when need be."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_pipeline import Params, copied, digests, new_project, run, small_params, stage, write_params

from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks
from maskllm4v.config import load_experiment
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.tracking.runs import settings_tags
from maskllm4v.utils.io import read_json

pytestmark = pytest.mark.slow

ROWS = {
    "small-dense": "Dense",
    "small-magnitude": "Magnitude",
    "small-squares": "Least squares",
    "small-hybrid": "Learned after",
    "small-again": "Updated after",
    "small-undone": "On dense weights",
}


def params() -> Params:
    """Magnitude masks; an update of them; masks learned on that; another update of these, and none."""
    found = small_params()
    found["priors"] = {"small-magnitude": {"method": "magnitude"}}
    found["updated"] = {
        "small-squares": {"masks": "small-magnitude", "update": "least_squares"},
        "small-again": {"masks": "small-hybrid", "update": "sparsegpt"},
        "small-undone": {"masks": "small-hybrid", "update": "none"},
    }
    hybrid = {"prior": "small-squares", "weights": "updated", "steps": 8, "distillation": 1.0, "lr": 0.5, "min_lr": 0.5}
    found["learned"] = {"small-hybrid": hybrid}
    return {**found, "finetuned": {}, "rows": ROWS, "exports": {}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By DVC, as far as the report."""
    project = new_project(tmp_path_factory.mktemp("updated"), params())
    done = run(project, "dvc", "repro", "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Running stage '") == 1 + 1 + 1 + 3 + 1 + 6 + 1
    return project


def masks_of(project: Path, row: str, seed: int = 5) -> MaskCheckpoint:
    return load_masks(project / "artifacts" / f"small-{row}" / f"seed{seed}.safetensors")


def test_checkpoints_hold_masks_and_weights(made: Path) -> None:
    magnitude, squares, hybrid, again = (masks_of(made, row) for row in ("magnitude", "squares", "hybrid", "again"))
    assert [found.method for found in (squares, hybrid, again)] == ["least_squares", "maskllm", "sparsegpt"]
    for name, mask in magnitude.masks.items():
        assert torch.equal(squares.masks[name], mask)
        assert torch.equal(hybrid.prior[name], mask)
        assert torch.equal(again.masks[name], hybrid.masks[name])
        for found in (squares, hybrid, again):
            weight = found.weights[f"{name}.weight"]
            assert weight.any()
            assert not weight[~found.masks[name]].any()
        both = mask & hybrid.masks[name]
        assert torch.equal(hybrid.weights[f"{name}.weight"][both], squares.weights[f"{name}.weight"][both])
    assert any((hybrid.masks[name] != mask).any() for name, mask in magnitude.masks.items())
    assert again.prior.keys() == hybrid.masks.keys()
    undone = masks_of(made, "undone")
    assert (undone.method, undone.weights) == ("maskllm", {})
    assert all(torch.equal(undone.masks[name], mask) for name, mask in hybrid.masks.items())
    assert {name.removesuffix(".weight") for name in squares.weights} == set(magnitude.masks)


def test_records_and_table_say_what_rows_are(made: Path) -> None:
    experiment = load_experiment(made / "params.yaml")
    kinds = {"squares": "updated", "again": "updated", "hybrid": "learned"}
    for row, kind in kinds.items():
        record = read_json(made / "reports/small/runs" / f"small-{row}" / "evaluation/record.json")
        assert (record["kind"], record["settings"]) == (kind, experiment.row(f"small-{row}").record_settings())
    table = (made / "reports/small/table.md").read_text().splitlines()
    cells = [[cell.strip(" *") for cell in line.split("|")[1:5]] for line in table if line.startswith("|")][2:]
    assert cells == [
        ["Dense", "dense", "–", "–"],
        ["Magnitude", "2:4", "–", "–"],
        ["Least squares", "2:4", "✔", "Magnitude"],
        ["Learned after", "2:4", "✔", "Least squares"],
        ["Updated after", "2:4", "✔", "Learned after"],
        ["On dense weights", "2:4", "–", "Learned after"],
    ]
    lines = aggregate(experiment, current_records(experiment, made / "reports"))
    assert list(lines["kind"]) == ["dense", "oneshot", "updated", "hybrid", "updated", "learned"]
    methods = [settings_tags(experiment, row)["method"] for row in ROWS]
    assert methods == ["dense", "magnitude", "least_squares", "maskllm", "sparsegpt", "maskllm"]
    weights = [settings_tags(experiment, row)["weights"] for row in ROWS]
    assert weights == ["dense", "dense", "updated", "updated", "updated", "dense"]
    assert (made / "reports/small/figures/accuracy.svg").exists()


def test_one_setting_makes_its_row_and_what_follows_again(made: Path, tmp_path: Path) -> None:
    project = shutil.copytree(made, tmp_path / "project", symlinks=True)
    assert "Running stage" not in run(project, "dvc", "repro", "report").stdout
    changed = params()
    changed["updated"]["small-squares"]["damping"] = 1.0
    write_params(project, changed)
    done = run(project, "dvc", "repro", "report")
    ran = [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]
    again = {f"{name}@small-{row}" for name, row in (("update", "squares"), ("train", "hybrid"), ("update", "again"))}
    again |= {"update@small-undone", "report"}
    again |= {f"evaluate@small-{row}" for row in ("squares", "hybrid", "again", "undone")}
    assert set(ran) == again
    assert ran.index("update@small-squares") < ran.index("train@small-hybrid") < ran.index("update@small-again")


def test_the_same_bytes_again(made: Path, tmp_path: Path) -> None:
    project = copied(made, tmp_path / "project")
    for row in ("squares", "again"):
        shutil.rmtree(project / "artifacts" / f"small-{row}")
        done = stage(project, "update", f"small-{row}", python=sys.executable)
        assert done.returncode == 0, done.stderr
    assert digests(project) == digests(made)


BAD_INPUT = {
    "unknown row": ("small-nothing", lambda p: None, "no row 'small-nothing'"),
    "row of another kind": (
        "small-magnitude",
        lambda p: None,
        "not an updated row; allowed: small-squares, small-again, small-undone",
    ),
    "masks of another pattern": (
        "small-squares",
        lambda p: p.update(pattern="1:4"),
        "holds 2:4 masks, not 1:4",
    ),
    "singular": (
        "small-squares",
        lambda p: (p["data"].update(calibration=1), p["updated"]["small-squares"].update(damping=0.0)),
        "kept weights is singular; calibrate on more samples, or raise `damping`",
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input(kind: str, made: Path, tmp_path: Path) -> None:
    row, change, message = BAD_INPUT[kind]
    project = copied(made, tmp_path / "project")
    changed = params()
    change(changed)
    write_params(project, changed)
    if kind == "singular":
        assert stage(project, "prepare", "digits").returncode == 0
    before = digests(project)
    done = stage(project, "update", row)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert digests(project) == before
