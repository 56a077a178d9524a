"""Stages and the DVC chain, end to end, on a small version of the digits experiment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from import_graph import ROOT
from PIL import Image

from maskllm4v.files import file_digest, read_json

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_CONFIG_GLOBAL": "/dev/null",
}
Params = dict[str, Any]


def small_params() -> Params:
    params: Params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"table": "small", "seeds": [0, 1]}
    params["data"]["calibration"] = 16
    params["dense"] |= {"row": "small-dense", "steps": 12}
    params["learning"] |= {"log_every": 5}
    params["priors"] = {
        "small-magnitude": {"method": "magnitude"},
        "small-sparsegpt-update": {"method": "sparsegpt", "update_weights": True},
    }
    params["learned"] = {"small-maskllm": {"prior": "small-magnitude", "steps": 8}}
    params["updated"] = {}
    params["finetuned"] = {"small-finetuned": {"start": "small-magnitude", "steps": 6, "lr": 0.001}}
    rows = ["small-dense", *params["priors"], *params["learned"], *params["finetuned"]]
    params["rows"] = {row: row for row in rows}
    params["exports"] = {"small-maskllm": {"formats": ["packed", "mask", "dense", "onnx"]}}
    return params


def new_project(folder: Path, params: Params) -> Path:
    """The code, without results, in a git repository of its own."""
    for name in ("maskllm4v", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "experiments").mkdir()
    for name in ("benchmarks", "receipts"):  # none ran
        (folder / "reports" / name).mkdir(parents=True)
    (folder / "README.md").write_text("<!-- small -->\n<!-- /small -->\n")
    write_params(folder, params)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True, env=ENVIRONMENT)
    subprocess.run(["dvc", "init", "-q"], cwd=folder, check=True, env=ENVIRONMENT)
    return folder


def write_params(folder: Path, params: Params) -> None:
    text = yaml.safe_dump(params, sort_keys=False)
    (folder / "params.yaml").write_text(text)
    (folder / "experiments" / "small.yaml").write_text(text)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def stage(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-m", f"stages.{name}", *arguments)


def chain(folder: Path) -> None:
    """All stages but ``track``, in order, without DVC."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    steps = [("prepare", params["data"]["name"]), ("dense", params["dense"]["row"])]
    steps += [("prior", row) for row in params["priors"]] + [("train", row) for row in params["learned"]]
    steps += [("finetune", row) for row in params["finetuned"]]
    steps += [("evaluate", row) for row in params["rows"]] + [("export", row) for row in params["exports"]]
    for name, argument in steps:
        done = stage(folder, name, argument)
        assert done.returncode == 0, done.stderr
    done = stage(folder, "report")
    assert done.returncode == 0, done.stderr


def digests(folder: Path) -> dict[str, str]:
    """Every result, tensors included."""
    files = [*(folder / "artifacts").rglob("*"), *(folder / "reports").rglob("*"), folder / "README.md"]
    return {str(path.relative_to(folder)): file_digest(path) for path in files if path.is_file()}


def test_dvc_chain(tmp_path: Path) -> None:
    """All runs once, then nothing; one changed setting re-runs its row and what follows, nothing else."""
    project, params = new_project(tmp_path, small_params()), small_params()
    first = run(project, "dvc", "repro")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("Running stage '") == 14
    readme = (project / "README.md").read_text()
    assert readme.count("±") > 10
    assert len(read_json(project / "mlruns/published/small.json")) == 5
    before = digests(project)

    second = run(project, "dvc", "repro")
    assert "Running stage" not in second.stdout
    assert "up to date" in second.stdout

    params["learned"]["small-maskllm"]["lr"] = 0.02
    write_params(project, params)
    third = run(project, "dvc", "repro")
    ran = [line.split("'")[1] for line in third.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["train@small-maskllm", "evaluate@small-maskllm", "export@small-maskllm", "report", "track"]
    assert (project / "README.md").read_text() != readme

    write_params(project, small_params())
    shutil.rmtree(project / "mlruns")
    (project / "mlflow.db").unlink()
    back = run(project, "dvc", "repro")
    assert back.returncode == 0, back.stderr
    assert "train@small-maskllm' is cached" in back.stdout
    assert digests(project) == before
    assert len(read_json(project / "mlruns/published/small.json")) == 5


@pytest.mark.parametrize("runtime", [{"loader_workers": 2}, {"seed_processes": 1}], ids=["workers", "one process"])
def test_runtime_changes_no_byte(tmp_path: Path, small_results: dict[str, str], runtime: dict[str, int]) -> None:
    params = small_params()
    params["runtime"] |= runtime
    project = new_project(tmp_path, params)
    chain(project)
    assert digests(project) == small_results


@pytest.fixture(scope="module")
def small_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = new_project(tmp_path_factory.mktemp("small"), small_params())
    chain(project)
    return project


def test_an_evaluation_leaves_nothing_of_the_one_before(small_project: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(small_project, project, ignore=shutil.ignore_patterns(".git", ".dvc"))
    folder = project / "reports/small/runs/small-magnitude/evaluation"
    (folder / "samples.png").write_bytes(b"of an earlier run")
    assert stage(project, "evaluate", "small-magnitude").returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["layers.csv", "masks.csv", "record.json", "tile.json"]
    assert digests(project) == digests(small_project)


@pytest.fixture(scope="module")
def small_results(small_project: Path) -> dict[str, str]:
    return digests(small_project)


def test_image_folders_and_a_timm_model(tmp_path: Path) -> None:
    """The same stages, on image folders and a model by name, by changing params alone."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    params = small_params()
    params["data"] = {"name": "pets", "source": "folder", "root": "data", "calibration": 8}
    params["task"] = {"name": "classification", "label_smoothing": 0.1}
    params["model"] = {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_classes": 2},
    }
    params["exact"] = False
    params["dense"] |= {"steps": 3, "batch_size": 6}
    params["learning"] |= {"batch_size": 6}
    params["learned"]["small-maskllm"]["steps"] = 3
    project = new_project(tmp_path, params)
    chain(project)
    record = read_json(project / "reports/small/runs/small-maskllm/evaluation/record.json")
    assert set(record["metrics"]["0"]) == {"top1", "top5", "nll", "ece", "agreement"}
    assert record["parameters"]["logits"] == 6 * (record["parameters"]["dense"] - record["parameters"]["kept"]) // 2


def edit(change: Callable[[Params], None]) -> Callable[[Path], None]:
    def apply(project: Path) -> None:
        params = small_params()
        change(params)
        write_params(project, params)

    return apply


def overwrite(path: str, content: bytes | None) -> Callable[[Path], None]:
    def apply(project: Path) -> None:
        file = project / path
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)

    return apply


def flip_last_byte(path: str) -> Callable[[Path], None]:
    def apply(project: Path) -> None:
        content = bytearray((project / path).read_bytes())
        content[-1] ^= 1
        (project / path).write_bytes(bytes(content))

    return apply


def another_dense(project: Path) -> None:
    shutil.copy(
        project / "artifacts/small-dense/seed0.safetensors", project / "artifacts/small-dense/seed1.safetensors"
    )


MAGNITUDE = "artifacts/small-magnitude/seed0.safetensors"
TRAIN = ("train", "small-maskllm")
BAD_INPUT = {
    "unknown key": (edit(lambda p: p.update(tabel="x")), TRAIN, "unknown key 'tabel'; did you mean 'table'?"),
    "wrong type": (edit(lambda p: p["learning"].update(lr="fast")), TRAIN, "learning.lr is 'fast'"),
    "unknown row": (edit(lambda p: None), ("train", "nonsense"), "no row 'nonsense'"),
    "row of another kind": (edit(lambda p: None), ("train", "small-dense"), "no learned row"),
    "unknown method": (
        edit(lambda p: p["priors"]["small-magnitude"].update(method="magnitud")),
        ("prior", "small-magnitude"),
        "allowed: magnitude, random, ria, sparsegpt, wanda",
    ),
    "unknown model": (
        edit(lambda p: p["model"].update(name="vit_huge", args={})),
        ("dense", "small-dense"),
        "'vit_huge'",
    ),
    "unknown source": (
        edit(lambda p: p["data"].update(source="cifar")),
        ("prepare", "digits"),
        "'digits', 'folder' or 'timm'",
    ),
    "misfit": (
        edit(lambda p: (p.update(pattern="3:6"), p["model"]["args"].update(embed_dim=32))),
        ("prior", "small-magnitude"),
        "no multiple of 6",
    ),
    "prior of another pattern": (edit(lambda p: p.update(pattern="1:4")), TRAIN, "holds 2:4 masks, not 1:4"),
    "prior missing": (overwrite(MAGNITUDE, None), TRAIN, f"{MAGNITUDE} is missing"),
    "prior truncated": (overwrite(MAGNITUDE, b"\x10\x00"), TRAIN, f"{MAGNITUDE} is damaged"),
    "prior damaged": (flip_last_byte(MAGNITUDE), TRAIN, "is damaged"),
    "prior of another model": (another_dense, TRAIN, "belongs to another dense model"),
    "data unprepared": (overwrite("artifacts/data/digits/test.csv", None), TRAIN, "run the prepare stage again"),
    "no folder": (
        edit(lambda p: p.update(data={"name": "digits", "source": "folder", "root": "nowhere"})),
        ("prepare", "digits"),
        "nowhere/train is no folder",
    ),
    "diverged": (
        edit(lambda p: p["dense"].update(lr=1e30, clip_grad=0.0)),
        ("dense", "small-dense"),
        "small-dense, seed ",
    ),
    "stale artifacts": (edit(lambda p: p["task"].update(shift=2)), ("evaluate", "small-dense"), "other settings"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input(kind: str, small_project: Path, tmp_path: Path) -> None:
    """A clear error of a line or two, an exit status, and nothing half-written."""
    damage, arguments, message = BAD_INPUT[kind]
    project = tmp_path / "project"
    shutil.copytree(small_project, project, ignore=shutil.ignore_patterns(".git", ".dvc"))
    damage(project)
    before = digests(project)
    done = stage(project, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert digests(project) == before
    assert not list(project.rglob("*.part"))
