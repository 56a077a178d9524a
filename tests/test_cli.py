"""The commands prune, train, update and validate, from folder to JSON; each gives what the pipeline's stages give."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import CLASSES, DENSE, KEYS, MODEL, TRAIN, Done, made_of, make_project, measured, run, well
from import_graph import ROOT
from PIL import Image
from torch import Tensor

import maskllm4v
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks
from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.runs.paths import checkpoint, curve_file, record_file
from maskllm4v.training.mask_learning import MaskLearner
from maskllm4v.utils.io import read_json

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", "batch_size": 3},
    "ria": {"method": "ria", "batch_size": 3},
    "sparsegpt": {"method": "sparsegpt", "batch_size": 3},
    "updated": {"method": "sparsegpt", "update_weights": True, "batch_size": 3},
}
UPDATES: dict[str, dict[str, Any]] = {
    "squares": {"masks": "updated", "update": "least_squares", "batch_size": 3},
    "damped": {"masks": "wanda", "update": "least_squares", "target": "symmetric", "damping": 0.5, "batch_size": 3},
    "corrected": {"masks": "learned", "update": "sparsegpt", "batch_size": 3},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with the same images and dense weights."""
    (tmp_path / "data").symlink_to(project / "data")
    shutil.copy(project / "dense.pt", tmp_path / "dense.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pipeline(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Experiment]:
    """The same settings as a params file, run by the stages."""
    import stages.dense
    import stages.evaluate
    import stages.prepare
    import stages.prior
    import stages.train
    import stages.update

    raw = {
        "table": "pets",
        "title": "Pets",
        "seeds": [5],
        "data": {"name": "pets", "source": "folder", "root": str(project / "data" / "imagenet"), "calibration": 5},
        "task": {"label_smoothing": 0.1, "hflip": 0.5, "erasing_mode": "pixel", "train_interpolation": "random"},
        "model": {"name": "test_vit", "args": {"num_classes": 3, "img_size": 32}},
        "dense": {"row": "dense", "init": "checkpoint", "checkpoint": str(project / "dense.pt")},
        "priors": METHODS,
        "learned": {"learned": {"prior": "wanda", "steps": 3, "batch_size": 4, "lr": 0.1, "log_every": 1}},
        "updated": UPDATES,
        "rows": dict.fromkeys(["dense", *METHODS, "learned", *UPDATES], "a row"),
        "runtime": {"device": "cpu"},
    }
    experiment, folder = parse_experiment(raw), tmp_path_factory.mktemp("pipeline")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        stages.prepare.main(experiment, "pets")
        stages.dense.main(experiment, "dense")
        for row in METHODS:
            stages.prior.main(experiment, row)
        stages.train.main(experiment, "learned")
        for row in UPDATES:
            stages.update.main(experiment, row)
        for row in experiment.rows:
            stages.evaluate.main(experiment, row)
    return folder, experiment


def of_stage(pipeline: tuple[Path, Experiment], row: str) -> MaskCheckpoint:
    return load_masks(pipeline[0] / checkpoint(row, 5))


def of_record(pipeline: tuple[Path, Experiment], row: str) -> dict[str, Any]:
    record = read_json(pipeline[0] / record_file("pets", row))
    return dict(record["summaries"]["5"])


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_dense_model_measured(here: Path, pipeline: tuple[Path, Experiment]) -> None:
    found = measured("--checkpoint", "dense.pt")
    assert found == measured(*DENSE) == of_record(pipeline, "dense")
    assert found["param_count"] == 0.3


def test_data_set_by_timm_s_name(here: Path) -> None:
    """Of the one split that is needed; folders are data sets, too."""
    named = ("--dataset", "torch/image_folder", "--train-split", "train")
    assert measured(*DENSE, "--dataset", "torch/image_folder", "--val-split", "val") == measured(*DENSE)
    well("train", *TRAIN, *DENSE, *named, "--output", "named.safetensors")
    well("train", *TRAIN, *DENSE, "--output", "folder.safetensors")
    found = [load_masks(here / f"{name}.safetensors").digest for name in ("named", "folder")]
    assert found[0] == found[1]


def test_top1_is_what_timm_s_own_data_and_model_give(here: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    model.load_state_dict(torch.load("dense.pt"))
    model.eval()
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform, hits = timm.data.create_transform(**config), 0
    for label, name in enumerate(CLASSES):
        for path in (here / "data" / "imagenet" / "val" / name).iterdir():
            with Image.open(path) as image, torch.no_grad():
                hits += int(model(transform(image.convert("RGB"))[None]).argmax()) == label
    found = measured("--checkpoint", "dense.pt", "--results-file", "found.json")
    assert found["top1"] == round(100 * hits / 12, 4)
    assert 0 < hits < 12
    assert found | {"top1": 0, "top1_err": 0} == {
        **dict.fromkeys(KEYS, 0),
        **{"model": "test_vit", "top5": 100.0, "param_count": 0.3, "img_size": 32},
        **{"crop_pct": config["crop_pct"], "interpolation": config["interpolation"]},
    }
    assert read_json(here / "found.json") == found


@pytest.mark.parametrize("row", METHODS)
def test_prune_and_validate_are_the_stages(row: str, here: Path, pipeline: tuple[Path, Experiment]) -> None:
    update = ["--enable-update"] if row == "updated" else []
    flags = ["--pruner", METHODS[row]["method"], *update, "--nsamples", "5", "-b", "3", "--seed", "5"]
    done = well("prune", *MODEL, *DENSE, *flags, "--save-model", "out/masks.safetensors")
    expected, found = of_stage(pipeline, row), load_masks(here / "out" / "masks.safetensors")
    assert len(found.masks) == 24
    assert "\nmasks on 24 of 26 matrices, " in f"\n{done.err}"
    assert "\ndense, excluded: 'head' (" in done.err
    assert "\ndense, convolution (an option): 'patch_embed.proj' (" in done.err
    assert same(found.masks, expected.masks)
    assert same(found.weights, expected.weights)
    assert bool(found.weights) == (row == "updated")
    assert (found.base, found.pattern, found.method) == (expected.base, expected.pattern, expected.method)
    assert done.out == ""
    assert made_of(here / "out") == {"masks.safetensors", f"dense-{found.base[:16]}.safetensors"}
    assert measured("--checkpoint", "out/masks.safetensors", "--sparsity-mode", "sparse") == of_record(pipeline, row)


def test_learned_masks_are_the_stage_s(here: Path, pipeline: tuple[Path, Experiment]) -> None:
    prior = pipeline[0] / checkpoint("wanda", 5)
    well("train", *TRAIN, *DENSE, "--checkpoint", str(prior), "--output", "out/learned.safetensors")
    expected, found = of_stage(pipeline, "learned"), load_masks(here / "out" / "learned.safetensors")
    assert same(found.masks, expected.masks)
    assert same(found.prior, expected.prior)
    assert not same(found.masks, found.prior)
    assert (found.base, found.method, found.weights) == (expected.base, "maskllm", {})
    curve = pipeline[0] / curve_file("pets", "learned", 5)
    assert (here / "out" / "learned.csv").read_bytes() == curve.read_bytes()
    assert not any((here / ".cache" / "cli" / "resume").iterdir())
    summary = measured("--checkpoint", "out/learned.safetensors", "--sparsity-mode", "maskllm")
    assert summary == of_record(pipeline, "learned")
    assert summary["param_count"] == round((300291 + 245760 / 4 * 6) / 1e6, 2)  # logits count
    sparse = measured("--checkpoint", "out/learned.safetensors", "--sparsity-mode", "sparse")
    assert sparse == summary | {"param_count": 0.3}


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ("squares", ()),
        ("damped", ("--target", "symmetric", "--damping", "0.5")),
        ("corrected", ("--update", "sparsegpt")),
    ],
)
def test_updated_weights_are_the_stage_s(
    row: str, flags: tuple[str, ...], here: Path, pipeline: tuple[Path, Experiment]
) -> None:
    source = str(pipeline[0] / checkpoint(UPDATES[row]["masks"], 5))
    common = ("--nsamples", "5", "-b", "3", "--seed", "5", "--checkpoint", source)
    done = well("update", *MODEL, *DENSE, *common, *flags, "--save-model", "out/masks.safetensors")
    expected, found = of_stage(pipeline, row), load_masks(here / "out" / "masks.safetensors")
    assert len(found.weights) == 24
    assert same(found.weights, expected.weights)
    assert same(found.masks, expected.masks)
    assert same(found.prior, expected.prior)
    assert bool(found.prior) == (row == "corrected")
    assert (found.base, found.pattern, found.method) == (expected.base, expected.pattern, expected.method)
    assert (f"{source}: other weights than the dense ones in 24 layers; unused" in done.err) == (row == "squares")
    assert done.out == ""
    assert made_of(here / "out") == {"masks.safetensors", f"dense-{found.base[:16]}.safetensors"}
    assert measured("--checkpoint", "out/masks.safetensors", "--sparsity-mode", "sparse") == of_record(pipeline, row)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_training_goes_on(
    number: signal.Signals, code: int, here: Path, pipeline: tuple[Path, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = str(pipeline[0] / checkpoint("wanda", 5))
    command = ("train", *TRAIN, *DENSE, "--checkpoint", prior, "--output", "out/learned.safetensors")
    steps: list[int] = []
    end_step = MaskLearner.end_step

    def interrupt(learner: MaskLearner, step: int) -> None:
        end_step(learner, step)
        steps.append(step)
        if len(steps) in (2, 3):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MaskLearner, "end_step", interrupt)
    for settings in ((), ("--lr", "0.2")):  # other settings: another training, from its start
        assert run(*command, *settings) == Done(code, "", "dense weights: dense.pt\n")
        assert made_of(here) == set()  # nothing half-written
    well(*command)
    assert steps == [0, 1, 0, 2]
    assert not any((here / ".cache" / "cli" / "resume").iterdir())
    assert same(load_masks(here / "out" / "learned.safetensors").masks, of_stage(pipeline, "learned").masks)
    curve = pipeline[0] / curve_file("pets", "learned", 5)
    assert (here / "out" / "learned.csv").read_bytes() == curve.read_bytes()


@pytest.mark.filterwarnings("ignore:masks cover only")  # of one block
def test_training_without_a_prior(here: Path) -> None:
    flags = ("--exclude", "head", "blocks.[1-5]", "--pattern", "1:4", "--hard", "--model-ema", "--curve", "c.csv")
    well("train", *TRAIN, *DENSE, *flags, "--output", "a.safetensors")
    well(
        "train",
        *TRAIN,
        *DENSE,
        *flags,
        "--init",
        "magnitude",
        "--steps",
        "1",
        "--lr",
        "1e-9",
        "--output",
        "b.safetensors",
    )
    found, magnitude = load_masks(here / "a.safetensors"), load_masks(here / "b.safetensors")
    assert {name.rpartition(".")[0] for name in found.masks} == {"blocks.0.attn", "blocks.0.mlp"}
    assert (str(found.pattern), found.prior) == ("1:4", {})
    well("prune", *MODEL, *DENSE, *flags[:5], "--save-model", "m.safetensors")
    assert same(magnitude.masks, load_masks(here / "m.safetensors").masks)
    assert not same(found.masks, magnitude.masks)


def original(folder: Path, pipeline: tuple[Path, Experiment], row: str, **changed: Any) -> dict[str, Tensor]:
    """A row's masks as the original's pruning script saves them."""
    state: dict[str, Tensor] = torch.load(folder / "dense.pt")
    masks = of_stage(pipeline, row)
    return state | dict(masks.weights) | {f"{name}.mask": mask.float() for name, mask in masks.masks.items()} | changed


def test_pruned_file_of_the_original(here: Path, pipeline: tuple[Path, Experiment]) -> None:
    torch.save(original(here, pipeline, "updated"), "updated.pt")
    found = measured("--checkpoint", "updated.pt", "--sparsity-mode", "sparse")
    assert found == of_record(pipeline, "updated")
    torch.save(original(here, pipeline, "wanda"), "wanda.pt")
    well("train", *TRAIN, "--sparse-checkpoint", "wanda.pt", "--output", "a.safetensors")
    found_masks = load_masks(here / "a.safetensors")
    assert same(found_masks.masks, of_stage(pipeline, "learned").masks)
    assert found_masks.base == of_stage(pipeline, "learned").base
    done = well("train", *TRAIN, *DENSE, "--checkpoint", "updated.pt", "--output", "b.safetensors")
    assert "updated.pt: other weights than the dense ones in 24 layers; unused" in done.err


@pytest.mark.parametrize("ema", [(), ("--use-ema",), ("--no-use-ema",)])
def test_trained_file_of_the_original(ema: tuple[str, ...], here: Path, pipeline: tuple[Path, Experiment]) -> None:
    """``[groups, 6]`` logits whose masks are other ones than those beside them; the average first."""

    def state(row: str) -> dict[str, Tensor]:
        masks = of_stage(pipeline, row)
        assert masks.pattern is not None
        gates = {f"{n}.gate": masks.pattern.similarity(mask).t().contiguous() for n, mask in masks.masks.items()}
        return original(here, pipeline, "magnitude") | gates

    whole = {"state_dict": state("wanda"), "state_dict_ema": state("learned"), "args": argparse.Namespace(lr=1e-3)}
    torch.save(whole, "model_best.pth.tar")
    found = measured("--checkpoint", "model_best.pth.tar", "--sparsity-mode", "maskllm", *ema)
    row = "wanda" if ema == ("--no-use-ema",) else "learned"
    assert found == of_record(pipeline, row) | {"param_count": of_record(pipeline, "learned")["param_count"]}


def test_layer_without_a_mask(here: Path, pipeline: tuple[Path, Experiment]) -> None:
    state = original(here, pipeline, "wanda")
    for block in range(6):
        del state[f"blocks.{block}.mlp.fc2.mask"]
    torch.save(state, "some.pt")
    for command in (("validate", *MODEL, "--sparsity-mode", "sparse"), ("train", *TRAIN, "--output", "a.safetensors")):
        done = run(*command, "--checkpoint", "some.pt")
        assert done.code == 1
        assert done.err.endswith(
            "some.pt: layer 'blocks.0.mlp.fc2' and 5 more have no mask; name layers that stay dense with --exclude\n"
        )
        assert made_of(here) == {"some.pt"}
        well(*command, "--checkpoint", "some.pt", "--exclude", "head", "blocks.*.mlp.fc2")
    assert len(load_masks(here / "a.safetensors").masks) == 18


def test_masks_find_their_dense_weights(here: Path, pipeline: tuple[Path, Experiment]) -> None:
    well("prune", *MODEL, *DENSE, "--save-model", "a/m.safetensors")
    (here / "b").mkdir()
    shutil.move("a/m.safetensors", "b/m.safetensors")
    sparse = ("--checkpoint", "b/m.safetensors", "--sparsity-mode", "sparse")
    done = run("validate", *MODEL, *sparse)
    base = of_stage(pipeline, "magnitude").base
    assert done == Done(
        1, "", f"validate: b/m.safetensors: dense-{base[:16]}.safetensors is not beside it; "
        "say --pretrained or --dense-checkpoint\n",
    )  # fmt: skip
    assert measured(*sparse, *DENSE) == of_record(pipeline, "magnitude")
    state = torch.load("dense.pt")
    state["head.bias"] += 1
    torch.save(state, "other.pt")
    done = run("validate", *MODEL, *sparse, "--dense-checkpoint", "other.pt")
    assert done.code == 1
    assert f"b/m.safetensors belongs to another dense model ({base[:12]}, not " in done.err


def test_val_images_calibrate_only_if_asked_to(here: Path) -> None:
    """As the original does it; the default does not even look for a validation split."""
    wanda = ("prune", *MODEL, *DENSE, "--pruner", "wanda", "--nsamples", "9", "--save-model")
    well(*wanda, "train.safetensors")
    well(*wanda, "val.safetensors", "--calibration-split", "val", "--train-split", "absent")
    assert not same(load_masks(here / "train.safetensors").masks, load_masks(here / "val.safetensors").masks)
    well(*wanda, "named.safetensors", "--train-split", "val", "--val-split", "absent")
    assert same(load_masks(here / "named.safetensors").masks, load_masks(here / "val.safetensors").masks)


@pytest.mark.parametrize("row", ["magnitude", "updated"])
def test_masks_are_not_measured_as_what_they_are_not(row: str, here: Path, pipeline: tuple[Path, Experiment]) -> None:
    torch.save(original(here, pipeline, row), "m.pt")
    for path in ("m.pt", str(pipeline[0] / checkpoint(row, 5))):
        done = run("validate", *MODEL, "--checkpoint", path)
        assert (done.code, done.err) == (1, f"validate: {path} holds masks; say --sparsity-mode sparse\n")
        done = run("validate", *MODEL, "--checkpoint", path, "--sparsity-mode", "maskllm")
        assert "holds masks, but no learned ones; say --sparsity-mode sparse" in done.err
    done = run("validate", *MODEL, *DENSE, "--checkpoint", "m.pt", "--sparsity-mode", "sparse")
    assert "m.pt brings weights of its own" in done.err


def test_zeroed_weights_are_no_dense_ones(here: Path, pipeline: tuple[Path, Experiment]) -> None:
    state = original(here, pipeline, "magnitude")
    state["blocks.3.attn.qkv.weight"] *= state["blocks.3.attn.qkv.mask"]
    torch.save(state, "zeroed.pt")
    assert measured("--checkpoint", "zeroed.pt", "--sparsity-mode", "sparse") == of_record(pipeline, "magnitude")
    for flags in (("--checkpoint", "zeroed.pt"), ("--dense-checkpoint", "zeroed.pt")):
        done = run("train", *TRAIN, *flags, "--output", "a.safetensors")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "zeroed.pt: pruned weights are zero in it, so the dense ones are lost" in done.err


def python(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maskllm4v", *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_real_processes(here: Path, pipeline: tuple[Path, Experiment]) -> None:
    """Standard output is the JSON object and nothing else; a mistake is a line and no traceback."""
    masks = str(pipeline[0] / checkpoint("updated", 5))
    done = python("validate", *MODEL, *DENSE, "--checkpoint", masks, "--sparsity-mode", "sparse")
    assert (done.returncode, json.loads(done.stdout)) == (0, of_record(pipeline, "updated"))
    assert done.stdout.startswith('{\n    "model": "test_vit",\n    "top1": ')
    assert "parameters: 300,291, of which 177,411 kept\ncross-entropy " in done.stderr
    done = python("validate", *MODEL, "--checkpoint", "absent.pt")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "validate: absent.pt is missing\n")


# The command itself


def test_version() -> None:
    assert run("--version").out == f"maskllm4v {maskllm4v.__version__}\n"


@pytest.mark.parametrize("command", [["python", "-m", "maskllm4v"], ["maskllm4v"]])
def test_the_command_is_installed(command: list[str], tmp_path: Path) -> None:
    """In any folder; help names the command as it was called."""
    program = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    done = subprocess.run([*program, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {' '.join(command)} [-h] [--version] command ...")
