"""The stage ``export`` behind a small chain: its files are the row that was measured, and the same bytes each time."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_pipeline import copied, digests, run, small_params, stage, write_params

from maskllm4v.checkpoints.apply import install
from maskllm4v.checkpoints.masks import load_dense, load_masks
from maskllm4v.checkpoints.packed import load_packed, load_packed_file
from maskllm4v.config import Experiment, load_experiment
from maskllm4v.export.onnx import about_graph
from maskllm4v.export.verify import passes, verify_file
from maskllm4v.runs.records import measurement_digest
from maskllm4v.sparsity.surgery import fold_
from maskllm4v.tasks.base import open_task
from maskllm4v.tasks.classification.models import build_model
from maskllm4v.utils.io import file_digest, read_json

pytestmark = pytest.mark.slow

ROW = "small-maskllm"
FILES = {
    *(f"{ROW}-{format}-{dtype}.safetensors" for format in ("packed", "dense") for dtype in ("fp32", "fp16")),
    f"{ROW}-mask.safetensors",
    f"{ROW}-fp32.onnx",
    f"{ROW}-fp16.onnx",
}


@pytest.fixture
def made(small_project: Path) -> Path:
    return small_project


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    return copied(made, tmp_path / "elsewhere")


@pytest.fixture
def exports(made: Path) -> Path:
    return made / "artifacts" / "exports" / ROW


def experiment(folder: Path) -> Experiment:
    return load_experiment(folder / "params.yaml")


def test_files_and_what_is_committed_of_them(made: Path, exports: Path) -> None:
    assert {path.name for path in exports.iterdir()} == FILES
    found = read_json(made / f"reports/small/runs/{ROW}/export.json")
    record = measurement_digest(read_json(made / f"reports/small/runs/{ROW}/evaluation/record.json"))
    facts = {"row": ROW, "seed": 3, "model": "VisionTransformer", "pattern": "2:4", "layers": 16, "record": record}
    assert {key: found[key] for key in facts} == facts
    assert {file["file"] for file in found["files"]} == FILES
    for file in found["files"]:
        path = exports / file["file"]
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, file_digest(path))
    dense = read_json(made / "reports/small/runs/small-dense/export.json")
    assert (dense["layers"], dense["pattern"], len(dense["files"])) == (0, None, 2)
    listed = (made / "reports/small/exports.md").read_text()
    assert all(listed.count(f"| {file['file']} | {file['bytes']:,} |") == 1 for file in found["files"])


def test_files_are_the_row_that_was_measured(made: Path, exports: Path) -> None:
    settings = experiment(made)
    task = open_task(settings.task_spec(), made / "artifacts/data/digits")
    expected, found = task.build_model(0), task.build_model(1)
    base = load_dense(made / "artifacts/small-dense/seed3.safetensors", expected, "VisionTransformer")
    path = made / "artifacts" / ROW / "seed3.safetensors"
    fold_(install(expected, load_masks(path, base=base), str(path)))
    packed = exports / f"{ROW}-packed-fp32.safetensors"
    load_packed(found, packed)
    of_readme = load_packed(build_model(settings.model, 0, pretrained=False), packed)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in of_readme.state_dict().items())
    wanted = expected.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    record = read_json(made / f"reports/small/runs/{ROW}/evaluation/record.json")
    assert task.evaluate(found)["top1"] == pytest.approx(record["metrics"]["3"]["top1"], abs=0.3)  # unpinned here
    about = load_packed_file(packed).about
    assert (about["method"], about["base"], about["manifest"]) == ("maskllm", base, task.data_digest)
    assert about["record"] == measurement_digest(read_json(made / f"reports/small/runs/{ROW}/evaluation/record.json"))
    graph = about_graph(exports / f"{ROW}-fp16.onnx")
    assert {key: graph[key] for key in ("model", "method", "base", "manifest", "record")} == {
        key: about[key] for key in ("model", "method", "base", "manifest", "record")
    }


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_graph_predicts_what_torch_does(dtype: str, made: Path, exports: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    settings = experiment(made)
    task = open_task(settings.task_spec(), made / "artifacts/data/digits")
    model = load_packed(task.build_model(0), exports / f"{ROW}-packed-{dtype}.safetensors").eval()
    session = runtime.InferenceSession(exports / f"{ROW}-{dtype}.onnx", providers=["CPUExecutionProvider"])
    seen = same = 0
    for images, _ in task.train_batches(seed=0, batch_size=100, steps=4):
        (scores,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            agree = torch.from_numpy(scores).argmax(1) == task.forward(model, (images, None)).argmax(1)
        seen, same = seen + len(agree), same + int(agree.sum())
    assert seen == 400
    assert same == seen if dtype == "fp32" else same >= seen - 2  # ties, nearly


def test_every_file_passes_the_verifier(exports: Path) -> None:
    for name in sorted(FILES):
        checks = verify_file(exports / name)
        assert passes(checks), name
        assert sum(check.verdict == "holds" for check in checks) == 16


def test_the_same_bytes_elsewhere(made: Path, here: Path) -> None:
    shutil.rmtree(here / "artifacts/exports")
    (here / "artifacts/exports" / ROW).mkdir(parents=True)
    (here / "artifacts/exports" / ROW / "of-an-earlier-run.onnx").write_bytes(b"old")
    for row in (ROW, "small-dense"):
        done = stage(here, "export", row, python=sys.executable)
        assert done.returncode == 0, done.stderr
    assert digests(here) == digests(made)


def test_wrong_rows(here: Path) -> None:
    done = stage(here, "export", "small-magnitude")
    assert done.returncode == 1
    assert done.stderr == (
        "export small-magnitude: exports names no row 'small-magnitude'; it has small-maskllm, small-dense\n"
    )
    settings = small_params()
    settings["exports"] = {"small-sparsegpt-update": {"formats": ["mask"]}}
    write_params(here, settings)
    done = stage(here, "export", "small-sparsegpt-update")
    assert done.returncode == 1
    assert "formats holds 'mask', but the row's weights are updated, too" in done.stderr
    settings["learned"][ROW]["lr"] = 0.5
    settings["exports"] = {ROW: {}}
    write_params(here, settings)
    done = stage(here, "export", ROW)
    assert done.returncode == 1
    assert "these artifacts were made with other settings" in done.stderr


def test_command_takes_rows_of_any_seed(here: Path) -> None:
    command = ("python", "-m", "maskllm4v", "export", ROW, "--format", "packed")
    for seed, name in ((3, "three"), (5, "five")):
        done = run(here, *command, "--seed-of-row", str(seed), "-o", f"{name}.safetensors")
        assert done.returncode == 0, done.stderr
    three, five = (load_packed_file(here / f"{name}.safetensors") for name in ("three", "five"))
    whole = load_packed_file(here / f"artifacts/exports/{ROW}/{ROW}-packed-fp32.safetensors")
    assert all(torch.equal(three.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert any(not torch.equal(five.tensors[name], tensor) for name, tensor in whole.tensors.items())
    done = run(here, *command, "--seed-of-row", "4")
    assert done.returncode == 1
    assert done.stderr == f"export: row '{ROW}' has no seed 4; allowed: 3, 5\n"
