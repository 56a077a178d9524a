"""The stages on a tiny diffusion transformer, end to end: the same bytes twice, records, pictures, bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_graph import ROOT
from PIL import Image
from small_diffusion import JUDGE, raw
from small_pipeline import digests, stage, write_params
from small_pipeline import run as command

from maskllm4v.checkpoints.masks import load_masks
from maskllm4v.config import load_experiment
from maskllm4v.utils.io import read_json

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.slow

Params = dict[str, Any]
Step = tuple[str, ...]
LOSS = {"eps_mse", "eps_mse/t0250", "eps_mse/t0750"}
DISTANCE = {name.replace("eps", "dense") for name in LOSS}
JUDGED = {"accuracy", "fd", "kd"}
ROWS = ("dense", "magnitude", "wanda", "nodata", "data", "squares")
ALL: list[Step] = [
    ("prepare", "digits"),
    ("dense", "small-dense"),
    ("prior", "small-magnitude"),
    ("prior", "small-wanda"),
    ("train", "small-nodata"),
    ("train", "small-data"),
    ("update", "small-squares"),
    *(("evaluate", f"small-{row}") for row in ROWS),
    ("export", "small-data"),
    ("report",),
    ("documents",),
]
# In one interpreter, and not a warm one; each command as its own would run it, but for the imports.
AFRESH = """
import json, runpy, sys
for stage, *arguments in json.loads(sys.argv[1]):
    sys.argv = [stage, *arguments]
    runpy.run_module(f"stages.{stage}", run_name="__main__")
"""


def params() -> Params:
    training = {"steps": 6, "batch_size": 32, "log_every": 2}
    return raw(
        table="small",
        title="Small",
        exact=True,
        seeds=[0],
        task={"judge": {**JUDGE, "training": {"steps": 10, "batch_size": 64, "lr": 0.01}}, "eval_batch_size": 64},
        dense={**training, "row": "small-dense", "lr": 0.01},
        priors={"small-magnitude": {"method": "magnitude"}, "small-wanda": {"method": "wanda", "inputs": "generated"}},
        learning={**training, "batch_size": 8, "lr": 0.1},
        learned={
            "small-nodata": {"prior": "small-magnitude", "inputs": "generated"},
            "small-data": {"prior": "small-magnitude"},
        },
        updated={"small-squares": {"masks": "small-magnitude", "update": "least_squares", "inputs": "generated"}},
        evaluation={"samples": 20, "clip": True},  # or all pixels would be black or white
        rows={f"small-{row}": row for row in ROWS},
        exports={"small-data": {"formats": ["packed", "onnx"], "dtypes": ["fp32"]}},
    )


def project(folder: Path, settings: Params) -> Path:
    (folder / "experiments").mkdir(parents=True)
    for name in ("benchmarks", "receipts"):
        (folder / "reports" / name).mkdir(parents=True)
    (folder / "README.md").write_text("<!-- small -->\n<!-- /small -->\n")
    write_params(folder, settings)
    return folder


def run(folder: Path, *steps: Step) -> subprocess.CompletedProcess[str]:
    """Stages one after the other, up to the first that fails; returns the last one."""
    for name, *arguments in steps:
        done = stage(folder, name, *arguments, PYTHONPATH=str(ROOT))
        if done.returncode:
            break
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = project(tmp_path_factory.mktemp("dit") / "project", params())
    done = run(folder, *ALL)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "project")


def evaluation(folder: Path, row: str) -> Path:
    return folder / "reports/small/runs" / f"small-{row}" / "evaluation"


def record(folder: Path, row: str) -> dict[str, Any]:
    return dict(read_json(evaluation(folder, row) / "record.json"))


def test_the_same_bytes_again(made: Path, tmp_path: Path) -> None:
    again = project(tmp_path / "elsewhere", params())
    done = command(again, sys.executable, "-c", AFRESH, json.dumps(ALL), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    found = digests(made)
    assert digests(again) == found
    assert {"artifacts/small-dense/judge.safetensors", "artifacts/small-nodata/seed0.safetensors"} <= found.keys()


def test_records_hold_what_was_measured(made: Path) -> None:
    experiment = load_experiment(made / "params.yaml")
    for row in ROWS:
        found = record(made, row)
        wanted = LOSS | JUDGED | ({"judge_accuracy"} if row == "dense" else DISTANCE)
        assert set(found["metrics"]["0"]) == wanted
        assert all(np.isfinite(list(found["metrics"]["0"].values())))
        assert found["settings"] == experiment.row(f"small-{row}").record_settings()
        assert found["summaries"]["0"] == {}
    assert record(made, "nodata")["settings"]["learning"]["distillation"] == 1.0
    counts = record(made, "nodata")["parameters"]
    assert counts["logits"] == 6 * (counts["dense"] - counts["kept"]) // 2
    lines = (evaluation(made, "nodata") / "layers.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 7


def test_rows_without_data_learn_from_the_samples(made: Path) -> None:
    prior = load_masks(made / "artifacts/small-magnitude/seed0.safetensors")
    learned = [load_masks(made / "artifacts" / row / "seed0.safetensors") for row in ("small-data", "small-nodata")]
    assert all(mask.equal(one.prior[name]) for one in learned for name, mask in prior.masks.items())
    curves = [made / "reports/small/runs" / row / "curves/seed0.csv" for row in ("small-data", "small-nodata")]
    assert curves[0].read_text() != curves[1].read_text()


def test_pictures_are_beside_the_records(made: Path) -> None:
    for row in ROWS:
        of_masks = {"masks.csv", "tile.json"} if row != "dense" else set()
        expected = {"record.json", "layers.csv", "samples.png"} | of_masks
        assert {path.name for path in evaluation(made, row).iterdir()} == expected
        with Image.open(evaluation(made, row) / "samples.png") as image:
            assert (image.format, image.size, image.mode) == ("PNG", (17, 17), "L")


def test_table_has_every_row(made: Path) -> None:
    table = (made / "reports/small/table.md").read_text().splitlines()
    lines = [line.split("|")[1].strip(" *") for line in table if line.startswith("|")]
    assert lines[-len(ROWS) :] == list(ROWS)
    assert "magnitude" in (made / "README.md").read_text()


def test_other_sampling_needs_no_other_rows(made: Path, here: Path) -> None:
    changed = params()
    changed["evaluation"]["steps"] = 3
    write_params(here, changed)
    done = run(here, ("evaluate", "small-nodata"))
    assert done.returncode == 0, done.stderr
    before, after = record(made, "nodata"), record(here, "nodata")
    assert before["settings_digest"] != after["settings_digest"]
    assert before["inputs"] == after["inputs"]
    metrics = before["metrics"]["0"], after["metrics"]["0"]
    assert all(metrics[0][name] == metrics[1][name] for name in LOSS | DISTANCE)
    assert metrics[0]["fd"] != metrics[1]["fd"]
    pictures = [(evaluation(folder, "nodata") / "samples.png").read_bytes() for folder in (made, here)]
    assert pictures[0] != pictures[1]


BAD_INPUT: dict[str, tuple[str, str, Any, Step, str]] = {
    "stale": ("task", "label_dropout", 0.2, ("evaluate", "small-dense"), "other settings"),
    "classes": ("model", "args", {"in_channels": 1}, ("dense", "small-dense"), "num_embeds_ada_norm is 1000, but the"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input(kind: str, here: Path) -> None:
    section, key, value, step, message = BAD_INPUT[kind]
    changed = params()
    changed[section][key] = value
    write_params(here, changed)
    before = digests(here)
    done = run(here, step)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert digests(here) == before
