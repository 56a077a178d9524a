"""Two processes on CPUs (gloo): they compute what one does, each sample once, and only the first one writes."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from images import draw_folder
from import_graph import ROOT
from small_project import (
    LONG,
    STEPS,
    begun,
    copied,
    ends,
    gone,
    ready_project,
    results,
    run_stage,
    said,
    saved_steps,
    stage_in,
    started,
    stopped,
    tell,
    tiny_params,
    together,
    until,
)

from maskllm4v.checkpoints.masks import load_dense, load_masks
from maskllm4v.config import Experiment, FinetunedSettings, load_experiment
from maskllm4v.data.batches import PlainBatches
from maskllm4v.oneshot.activations.sequential import part_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.runs.paths import checkpoint, data_folder
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.surgery import make_learnable
from maskllm4v.sparsity.survey import prunable_matrices
from maskllm4v.tasks.base import Task, open_task
from maskllm4v.training.finetuning import finetune
from maskllm4v.training.mask_learning import CURVE_COLUMNS, learn_masks
from maskllm4v.utils.io import read_json

pytestmark = pytest.mark.slow

ROWS = ("tiny-magnitude", "tiny-wanda", "tiny-sparsegpt")
MEASURED = ("tiny-dense", "tiny-wanda")
TRAIN = (sys.executable, "-m", "stages.train", "tiny-averaged")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that one process makes."""
    params = tiny_params()
    params["model"]["args"]["drop_path_rate"] = 0.0  # drawn anew in every process
    folder = ready_project(tmp_path_factory.mktemp("one"), params)
    stages = [*(("prior", row) for row in ROWS[1:]), ("update", "tiny-squares"), ("train", "tiny-averaged")]
    for stage, row in [*stages, *(("evaluate", row) for row in MEASURED)]:
        assert run_stage(folder, stage, row) == [0], said(folder)
    return folder


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two processes, from the same data and dense model; what each wrote is in ``wrote-*-<rank>.txt``."""
    folder = copied(one, tmp_path_factory.mktemp("two") / "project")
    for stage, row in [*(("prior", row) for row in ROWS), ("update", "tiny-squares"), ("train", "tiny-averaged")]:
        assert together(folder, _watched_stage, stage, row, processes=2) == [0, 0], said(folder)
    return folder


@pytest.fixture(scope="module")
def measured_by_two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process made, measured by two; which images each saw is in ``measured-*-<rank>.txt``."""
    folder = copied(one, tmp_path_factory.mktemp("measured") / "project")
    for row in MEASURED:
        assert together(folder, _watched_stage, "evaluate", row, processes=2) == [0, 0], said(folder)
    return folder


def _watched_stage(stage: str, row: str) -> None:
    """A stage; says which files of the project it wrote, made or removed, and which images it measured."""
    rank, home, wrote, measured = os.environ["RANK"], str(Path.cwd()), list[str](), list[int]()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        changes = ("os.mkdir", "os.rename", "os.remove", "os.chmod", "shutil.rmtree", "tempfile.mkstemp")
        if event in changes or (event == "open" and arguments[2] & WRITING):
            path = os.path.abspath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else ""
            if path.startswith(home) and not path.endswith(f"steps-{rank}.txt"):
                wrote.append(f"{event} {path}")

    def getitem(batches: PlainBatches, item: int, real: Any = PlainBatches.__getitem__) -> Any:
        if batches.split == "test":
            measured.extend(batches.indices[item * batches.batch_size : (item + 1) * batches.batch_size].tolist())
        return real(batches, item)

    sys.addaudithook(watch)
    PlainBatches.__getitem__ = getitem  # type: ignore[method-assign]
    stage_in(stage, row, None)
    texts = {name: "\n".join(map(str, found)) for name, found in (("wrote", wrote), ("measured", measured))}
    for name, text in texts.items():
        Path(f"{name}-{stage}-{row}-{rank}.txt").write_text(text)


def test_only_the_first_process_writes(two: Path, measured_by_two: Path) -> None:
    for folder, count in ((two, len(ROWS) + 2), (measured_by_two, len(MEASURED))):
        first, second = (list(folder.glob(f"wrote-*-{rank}.txt")) for rank in (0, 1))
        assert len(first) == len(second) == count
        assert all(path.read_text().count("\n") > 5 for path in first)
        assert [path.read_text() for path in second] == [""] * count


# Pruning


def test_magnitude_masks_are_the_same(one: Path, two: Path) -> None:
    path = checkpoint("tiny-magnitude", 0)
    assert (one / path).read_bytes() == (two / path).read_bytes()


@pytest.mark.parametrize("row", ROWS[1:])
def test_masks_are_those_of_one_process(row: str, one: Path, two: Path) -> None:
    a, b = (load_masks(folder / checkpoint(row, 0), pattern="2:4").masks for folder in (one, two))
    assert a.keys() == b.keys()
    same = torch.cat([(a[name] == b[name]).reshape(-1, 4).all(1) for name in a])
    assert same.double().mean() >= 0.999


def test_updated_weights_are_those_of_one_process(one: Path, two: Path) -> None:
    a, b = (load_masks(folder / checkpoint("tiny-squares", 0), pattern="2:4").weights for folder in (one, two))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, rtol=0, atol=1e-4 * float(weight.abs().max()))


def opened() -> tuple[Experiment, Task, torch.nn.Module]:
    """Inside a project: settings, task, dense model."""
    experiment = load_experiment()
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))
    model = task.build_model(0)
    load_dense(checkpoint("tiny-dense", 0), model, experiment.model.name)
    return experiment, task, model


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _statistics(name: str) -> None:
    experiment, task, model = opened()
    layers, found = prunable_matrices(model, exclude=experiment.model.exclude), {}
    for statistic in (InputNorm, Hessian):
        units = part_statistics(model, layers, task.calibration(20, 0), statistic, propagate="dense")
        for layer, one in ((layer, one) for unit in units for layer, one in unit.items()):
            found[f"{statistic.__name__} {layer}"] = one.sum_of_squares if statistic is InputNorm else one.mean
            found[f"{statistic.__name__} {layer} rows"] = torch.tensor(one.rows)
    torch.save(found, f"{name}-{rank()}.pt")


def of_ranks(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_statistics_are_those_of_one_process(one: Path, two: Path) -> None:
    """45 images, 23 and 22 of them in a process, in batches of 20."""
    assert together(one, _statistics, "statistics") == [0], said(one)
    assert together(two, _statistics, "statistics", processes=2) == [0, 0], said(two)
    expected = torch.load(one / "statistics-0.pt", weights_only=True)
    first, second = of_ranks(two, "statistics")
    assert expected.keys() == first.keys() == second.keys()
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])
        if name.endswith("rows"):
            assert value == 45 * 16  # tokens


# Training


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _learn(name: str) -> None:
    experiment, task, model = opened()
    prior = load_masks(checkpoint("tiny-magnitude", 0), pattern="2:4")
    make_learnable(model, prior.masks, pattern="2:4", seed=0)
    learn_masks(model, task, experiment.learned["tiny-averaged"], seed=0)
    torch.save([layer.logits for layer in learnable_masks(model).values()], f"{name}-{rank()}.pt")


def test_logits_are_the_same_in_both_processes(two: Path) -> None:
    assert together(two, _learn, "logits", processes=2) == [0, 0], said(two)
    first, second = of_ranks(two, "logits")
    assert len(first) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_loss_is_near_that_of_one_process(one: Path, two: Path) -> None:
    """Each process draws noise of its own; all else of a step is the same."""
    curves = [table(folder / "reports/tiny/runs/tiny-averaged/curves/seed0.csv") for folder in (one, two)]
    assert [int(point["step"]) for point in curves[0]] == [*range(0, STEPS, 4), STEPS - 1]
    assert tuple(curves[0][0]) == CURVE_COLUMNS
    for a, b in zip(*curves, strict=True):
        assert all(a[key] == b[key] for key in ("step", "lr", "tau", "scaling"))
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=0.1)


def _descend(name: str, accumulate: int) -> None:
    """Plain gradient descent, so that weights show gradients as they are."""
    _, task, model = opened()
    common: dict[str, Any] = {"batch_size": 64, "weight_decay": 0.0, "clip_grad": 0.0, "log_every": 1}
    settings = FinetunedSettings(
        **{**common, "start": "tiny-dense", "steps": 3, "lr": 0.5, "accumulate": accumulate},
        optimizer="sgd",
        optimizer_args={"momentum": 0.0, "nesterov": False},
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    curve, _ = finetune(model, task, settings, seed=0, row="descent")
    moved = [after.detach() - old for after, old in zip(model.parameters(), before, strict=True)]
    torch.save([*moved, torch.tensor(curve)], f"{name}-{rank()}.pt")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_one_process(accumulate: int, one: Path, two: Path) -> None:
    assert together(one, _descend, "descent", 1) == [0], said(one)
    assert together(two, _descend, "descent", accumulate, processes=2) == [0, 0], said(two)
    expected = torch.load(one / "descent-0.pt", weights_only=True)
    first, second = of_ranks(two, "descent")
    assert max(float(moved.abs().max()) for moved in expected[:-1]) > 0.01
    for a, b, c in zip(expected, first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(b, c)


# Evaluation


def test_every_image_is_measured_once(measured_by_two: Path) -> None:
    """899 of them, 450 and 449 in a process."""
    for row in MEASURED:
        files = [measured_by_two / f"measured-evaluate-{row}-{rank}.txt" for rank in (0, 1)]
        parts = [file.read_text().split() for file in files]
        assert [len(part) for part in parts] == [450, 449]
        assert sorted(map(int, parts[0] + parts[1])) == list(range(899))


@pytest.mark.parametrize("row", MEASURED)
def test_metrics_are_those_of_one_process(row: str, one: Path, measured_by_two: Path) -> None:
    path = f"reports/tiny/runs/{row}/evaluation"
    a, b = (read_json(folder / path / "record.json") for folder in (one, measured_by_two))
    for name, value in a.pop("metrics")["0"].items():
        tolerance = {"nll": 1.5e-6, "ece": 1e-4}.get(name, 0.0)  # a record's numbers are rounded to 1e-6
        assert b["metrics"]["0"][name] == pytest.approx(value, rel=0, abs=tolerance)
    assert a["evaluated"].pop("world_size") == 1
    assert b["evaluated"].pop("world_size") == 2
    assert a["made"]["world_size"] == b["made"]["world_size"] == 1
    assert a.pop("digest") != b["digest"]
    assert a == {key: value for key, value in b.items() if key not in ("metrics", "digest")}
    layers = [table(folder / path / "layers.csv") for folder in (one, measured_by_two)]
    assert len(layers[0]) == (0 if row == "tiny-dense" else 8)
    for x, y in zip(*layers, strict=True):
        error, same = float(x.pop("output_error")), float(y.pop("output_error"))
        assert error == pytest.approx(same, rel=1e-4)
        assert x == y


def test_records_say_how_many_processes_made_a_row(two: Path) -> None:
    assert read_json(two / "artifacts/tiny-averaged/made.json")["world_size"] == 2
    assert run_stage(two, "evaluate", "tiny-averaged") == [0], said(two)
    record = read_json(two / "reports/tiny/runs/tiny-averaged/evaluation/record.json")
    assert record["made"]["world_size"] == 2
    assert record["evaluated"]["world_size"] == 1


# Commands


def test_number_of_processes_is_no_part_of_a_command() -> None:
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        stage = stage.get("do", stage)
        assert stage["cmd"].split()[:3] == ["python", "-m", f"stages.{name}"]
        assert not {"--", "torchrun", "processes"} & set(stage["cmd"].split())
        listed = ([entry] if isinstance(entry, str) else entry["params.yaml"] for entry in stage.get("params", []))
        assert "runtime" not in [name for names in listed for name in names]


def test_launcher(one: Path, measured_by_two: Path, tmp_path: Path) -> None:
    """MASKLLM4V_LAUNCHER goes before ``runtime.processes``."""
    params = yaml.safe_load((one / "params.yaml").read_text())
    params["runtime"]["processes"] = 3
    folder = copied(one, tmp_path / "project", params)
    launcher = f"'{sys.executable}' -m torch.distributed.run --standalone --nproc-per-node 2"
    command = (sys.executable, "-m", "stages.evaluate", "tiny-wanda")
    assert ends(started(folder, *command, MASKLLM4V_LAUNCHER=launcher)) == 0, said(folder)
    record = "reports/tiny/runs/tiny-wanda/evaluation/record.json"
    assert (folder / record).read_bytes() == (measured_by_two / record).read_bytes()
    assert said(folder).count("tiny-wanda: {") == 1


def test_torchrun_of_a_command(tmp_path: Path) -> None:
    """The command line, without the pipeline: files and messages of one process."""
    draw_folder(tmp_path / "data", {"train": (20, 21)})
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=2, img_size=32).state_dict(), tmp_path / "dense.pt")
    flags = ["--model", "test_vit", "--num-classes", "2", "--img-size", "32", "--device", "cpu", "-j", "0"]
    flags += ["--data-dir", "data", "--dense-checkpoint", "dense.pt", "-b", "8", "--steps", "6", "--log-interval", "2"]
    flags += ["--save-minutes", "0.000001", "--output", "masks.safetensors"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert ends(started(tmp_path, *launcher, "-m", "maskllm4v", "train", *flags)) == 0, said(tmp_path)
    masks = load_masks(tmp_path / "masks.safetensors", pattern="2:4").masks
    assert len(masks) > 10
    assert (tmp_path / "masks.csv").read_text().count("\n") == 1 + 4
    assert said(tmp_path).count("masks.safetensors: 2:4 masks of") == 1
    assert not [path for path in (tmp_path / ".cache/cli/resume").rglob("*") if path.is_file()]


def test_torchrun_is_interrupted(one: Path, tmp_path: Path) -> None:
    """Told by the scheduler, all processes at once, and by torchrun once more; then torchrun is killed."""
    params = yaml.safe_load((one / "params.yaml").read_text())
    params["learned"]["tiny-averaged"]["steps"] = LONG
    folder = copied(one, tmp_path / "whole", params)
    assert run_stage(folder, "train", "tiny-averaged", 2) == [0, 0]
    expected = results(folder, "tiny-averaged")

    params["runtime"]["processes"] = 2
    folder = copied(one, tmp_path / "project", params)
    with stopped(folder, "tiny-averaged", 1, *TRAIN) as (running, everything):
        assert len(everything) == 3
        for process in everything:
            tell(process, signal.SIGTERM)
    assert ends(running) != 0
    until(lambda: gone(everything))
    assert saved_steps(folder, "tiny-averaged")[0] < LONG

    with stopped(folder, "tiny-averaged", 1, *TRAIN) as (running, everything):
        running.kill()
    assert ends(running) == -signal.SIGKILL
    until(lambda: gone(everything))
    assert saved_steps(folder, "tiny-averaged")[0] < LONG

    assert ends(begun(folder, "tiny-averaged", 1, *TRAIN)) == 0, said(folder)
    assert results(folder, "tiny-averaged") == expected
