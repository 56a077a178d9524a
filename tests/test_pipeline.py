"""Stages and the DVC chain, end to end, on a small version of the digits experiment."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_pipeline import Params, chain, copied, digests, new_project, run, small_params, stage, write_params

from maskllm4v.utils.io import read_json

pytestmark = pytest.mark.slow


def test_dvc_chain(small_repro: Path) -> None:
    """All runs once, then nothing; one changed setting re-runs its row and what follows, nothing else."""
    project, params = small_repro / "repro", small_params()
    assert (small_repro / "said").read_text().count("Running stage '") == 16
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
    assert ran[:3] == ["train@small-maskllm", "evaluate@small-maskllm", "export@small-maskllm"]
    assert sorted(ran[3:]) == ["documents", "report", "track"]
    assert (project / "README.md").read_text() != readme

    write_params(project, small_params())
    shutil.rmtree(project / "mlruns")
    (project / "mlflow.db").unlink()
    back = run(project, "dvc", "repro")
    assert back.returncode == 0, back.stderr
    assert "train@small-maskllm' is cached" in back.stdout
    assert digests(project) == before
    assert len(read_json(project / "mlruns/published/small.json")) == 5


TORCH = {"dense", "prior", "train", "finetune", "evaluate", "export", "track"}
RESTARTS = {  # as docs/architecture.md has it; updates are priors' neighbours, and the small table has none
    "reporting/tables.py": {"report", "documents", "track"},
    "receipts/text.py": {"report", "documents"},
    "tracking/runs.py": {"track"},
    "export/files.py": {"export", "track"},
    "evaluation/evaluate.py": {"evaluate"},
    "oneshot/methods/wanda.py": {"prior"},
    "training/trainer.py": {"dense", "train", "finetune"},
    "tasks/classification/accuracy.py": TORCH,
    "tasks/classification/settings.py": {"prepare", "report", "documents", *TORCH},
    "tasks/diffusion/noising.py": set(),
    "tasks/diffusion/settings.py": {"report", "documents"},
    "sparsity/patterns.py": TORCH,
    "utils/errors.py": {"prepare", "report", "documents", *TORCH},
    "cli/prune.py": set(),
}


def test_an_edit_restarts_what_the_documentation_promises(small_repro: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(small_repro / "repro", project, symlinks=True)

    def stale() -> set[str]:
        done = run(project, "dvc", "status", "--json")
        assert done.returncode == 0, done.stderr
        return {stage.partition("@")[0] for stage in json.loads(done.stdout)}

    assert stale() == set()
    for name, stages in RESTARTS.items():
        path = project / "maskllm4v" / name
        before = path.read_bytes()
        path.write_bytes(before + b"# an edit\n")
        assert stale() == stages, name
        path.write_bytes(before)


@pytest.mark.parametrize("runtime", [{"loader_workers": 2}, {"seed_processes": 1}], ids=["workers", "one process"])
def test_runtime_changes_no_byte(tmp_path: Path, small_project: Path, runtime: dict[str, int]) -> None:
    params = small_params()
    params["runtime"] |= runtime
    project = new_project(tmp_path, params)
    chain(project)
    assert digests(project) == digests(small_project)


def test_fresh_interpreters_change_no_byte(tmp_path: Path, small_project: Path) -> None:
    """The stages that train, which are forked from a warm process elsewhere in these tests."""
    project = copied(small_project, tmp_path / "project")
    for name, row in (("dense", "small-dense"), ("train", "small-maskllm"), ("finetune", "small-finetuned")):
        shutil.rmtree(project / "artifacts" / row)
        done = stage(project, name, row, python=sys.executable)
        assert done.returncode == 0, done.stderr
    assert digests(project) == digests(small_project)


def test_an_evaluation_leaves_nothing_of_the_one_before(small_project: Path, tmp_path: Path) -> None:
    project = copied(small_project, tmp_path / "project")
    folder = project / "reports/small/runs/small-magnitude/evaluation"
    (folder / "samples.png").write_bytes(b"of an earlier run")
    assert stage(project, "evaluate", "small-magnitude", python=sys.executable).returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["layers.csv", "masks.csv", "record.json", "tile.json"]
    assert digests(project) == digests(small_project)


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
    assert set(record["metrics"]["3"]) == {"top1", "top5", "nll", "ece", "agreement"}
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
        project / "artifacts/small-dense/seed3.safetensors", project / "artifacts/small-dense/seed5.safetensors"
    )


MAGNITUDE = "artifacts/small-magnitude/seed3.safetensors"
TRAIN = ("train", "small-maskllm")
BAD_INPUT = {
    "unknown key": (edit(lambda p: p.update(tabel="x")), TRAIN, "unknown key 'tabel'; did you mean 'table'?"),
    "wrong type": (edit(lambda p: p["learning"].update(lr="fast")), TRAIN, "learning.lr is 'fast'"),
    "unknown row": (edit(lambda p: None), ("train", "nonsense"), "no row 'nonsense'"),
    "row of another kind": (edit(lambda p: None), ("train", "small-dense"), "not a learned row"),
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
        "'digits', 'folder', 'masks', 'scenes' or 'timm'",
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
    project = copied(small_project, tmp_path / "project")
    damage(project)
    before = digests(project)
    done = stage(project, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert digests(project) == before
    assert not list(project.rglob("*.part"))
